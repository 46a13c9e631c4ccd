{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{/* A container with the agent's image and its mounts. */}}
{{- define "sluice.container" -}}
image: {{ include "sluice.image" .root | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
{{- with .args }}
args:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if .capabilities }}
env:
  - name: SLUICE_NODE_NAME
    valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
{{- end }}
terminationMessagePolicy: FallbackToLogsOnError
securityContext:
  {{- include "sluice.securityContext" . | nindent 2 }}
{{- if .capabilities }}
volumeMounts:
  {{- include "sluice.volumes" (dict "root" .root "mounts" true) | nindent 2 }}
{{- end }}
{{- end -}}
