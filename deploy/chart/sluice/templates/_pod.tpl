{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{/* The common part of the agent's pods and those of the embedded ztunnel. */}}
{{- define "sluice.podSpec" -}}
priorityClassName: {{ .Values.priorityClassName }}
hostNetwork: true
dnsPolicy: ClusterFirstWithHostNet
enableServiceLinks: false
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "sluice.podLabels" -}}
{{- with .Values.podLabels }}
{{- toYaml . }}
{{ end -}}
istio.io/dataplane-mode: none
sidecar.istio.io/inject: "false"
{{- end -}}

{{- define "sluice.appArmor" -}}
{{- if eq .Values.appArmor "auto" }}{{ ternary "field" "annotation" (semverCompare ">=1.30-0" .Capabilities.KubeVersion.Version) }}{{ else }}{{ .Values.appArmor }}{{ end -}}
{{- end -}}

{{- define "sluice.podAnnotations" -}}
{{- with .root.Values.podAnnotations }}
{{- toYaml . }}
{{ end -}}
{{- if eq (include "sluice.appArmor" .root) "annotation" -}}
{{- range .containers }}
container.apparmor.security.beta.kubernetes.io/{{ . }}: unconfined
{{ end -}}
{{- end -}}
{{- end -}}

{{/* Root with only the named capabilities. */}}
{{- define "sluice.securityContext" -}}
privileged: false
readOnlyRootFilesystem: true
runAsUser: 0
runAsGroup: 0
capabilities:
  drop: [ALL]
  add: [{{ join ", " .capabilities }}]
{{- with .root.Values.seccompProfile }}
seccompProfile:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with include "sluice.seLinux" .root | fromYaml }}
seLinuxOptions:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- if eq (include "sluice.appArmor" .root) "field" }}
appArmorProfile:
  type: Unconfined
{{- end }}
{{- end -}}

{{/* Volumes of the agent; with .mounts true their mounts. */}}
{{- define "sluice.volumes" -}}
{{- $settings := include "sluice.settings" .root | fromYaml -}}
{{- $mounts := .mounts -}}
{{- $run := $settings.run_dir | default "/run/sluice" -}}
{{- $zds := dir ($settings.zds_socket | default "/var/run/ztunnel/ztunnel.sock") -}}
{{- $bpf := dir ($settings.bpf_dir | default "/sys/fs/bpf/sluice") -}}
{{- $host := $settings.host_root -}}
- name: config
{{- if $mounts }}
  mountPath: /etc/sluice
  readOnly: true
{{- else }}
  configMap: {name: sluice}
{{- end }}
- name: files
{{- if $mounts }}
  mountPath: /etc/sluice-files
  readOnly: true
{{- else }}
  configMap: {name: sluice-files}
{{- end }}
{{ include "sluice.hostPath" (dict "name" "run" "path" $run "mounts" $mounts "create" true) }}
{{- if ne $zds $run }}
{{ include "sluice.hostPath" (dict "name" "ztunnel" "path" $zds "mounts" $mounts "create" true) }}
{{- end }}
{{ include "sluice.hostPath" (dict "name" "bpf" "path" $bpf "mounts" $mounts "propagation" true) }}
{{- range $number, $path := include "sluice.netnsDirs" .root | fromJsonArray }}
{{ include "sluice.hostPath" (dict "name" (printf "netns-%d" $number) "path" $path "mounts" $mounts "create" true "propagation" true) }}
{{- end }}
{{- if ne $host "/" }}
{{ include "sluice.hostPath" (dict "name" "host" "path" "/" "at" $host "mounts" $mounts "propagation" true "readOnly" true) }}
{{- range $number, $path := include "sluice.writable" .root | fromJsonArray }}
{{ include "sluice.hostPath" (dict "name" (printf "writable-%d" $number) "path" $path "at" (printf "%s%s" $host $path) "mounts" $mounts "create" true "propagation" true) }}
{{- end }}
{{- end }}
{{- with .root.Values.cgroupRoot }}
{{ include "sluice.hostPath" (dict "name" "cgroup" "path" . "at" "/cgroup" "mounts" $mounts "readOnly" true) }}
{{- end }}
# The lock that every program of iptables on the node takes.
- name: xtables-lock
{{- if $mounts }}
  mountPath: /run/xtables.lock
{{- else }}
  hostPath: {path: /run/xtables.lock, type: FileOrCreate}
{{- end }}
{{- if hasPrefix "/" ($settings.connection_log | default "") }}
{{ include "sluice.hostPath" (dict "name" "log" "path" (dir $settings.connection_log) "mounts" $mounts "create" true) }}
{{- end }}
{{- end -}}

{{- define "sluice.hostPath" -}}
- name: {{ .name }}
{{- if .mounts }}
  mountPath: {{ .at | default .path }}
  {{- if .readOnly }}
  readOnly: true
  {{- end }}
  {{- if .propagation }}
  mountPropagation: HostToContainer
  {{- end }}
{{- else }}
  hostPath:
    path: {{ .path }}
    {{- if .create }}
    type: DirectoryOrCreate
    {{- end }}
{{- end }}
{{- end -}}
