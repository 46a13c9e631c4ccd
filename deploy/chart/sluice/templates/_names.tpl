{{- /* SPDX-License-Identifier: Apache-2.0 */ -}}
{{- define "sluice.labels" -}}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
app.kubernetes.io/name: sluice
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "sluice.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}
{{- else -}}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* The platform's values, as YAML. */}}
{{- define "sluice.platform" -}}
{{- toYaml (index (.Files.Get "files/platforms.yaml" | fromYaml) .Values.platform) -}}
{{- end -}}

{{/* {"value": V}: the user's value; the platform's if that is null. */}}
{{- define "sluice.seLinux" -}}
{{- $platform := include "sluice.platform" . | fromYaml -}}
{{- $own := .Values.seLinuxOptions -}}
{{- if kindIs "invalid" $own }}{{ toYaml ($platform.seLinuxOptions | default dict) }}{{ else }}{{ toYaml $own }}{{ end -}}
{{- end -}}

{{- define "sluice.quota" -}}
{{- $own := .Values.resourceQuota.enabled -}}
{{- if kindIs "invalid" $own }}{{ (include "sluice.platform" . | fromYaml).resourceQuota | default false }}{{ else }}{{ $own }}{{ end -}}
{{- end -}}

{{- define "sluice.scc" -}}
{{- $own := .Values.scc -}}
{{- if kindIs "invalid" $own }}{{ (include "sluice.platform" . | fromYaml).scc | default false }}{{ else }}{{ $own }}{{ end -}}
{{- end -}}

{{- define "sluice.netnsDirs" -}}
{{- $own := .Values.netnsDirs -}}
{{- if kindIs "invalid" $own }}{{ (include "sluice.platform" . | fromYaml).netnsDirs | default (list "/var/run/netns") | toJson }}{{ else }}{{ toJson $own }}{{ end -}}
{{- end -}}

{{/* Writable host directories for the installer: the platform's or the user's, and the parents of those in settings. */}}
{{- define "sluice.writable" -}}
{{- $own := .Values.writable -}}
{{- if kindIs "invalid" $own }}{{ $own = (include "sluice.platform" . | fromYaml).writable | default (list "/etc/cni" "/opt/cni") }}{{ end -}}
{{- $settings := include "sluice.settings" . | fromYaml -}}
{{- range $key := list "cni_conf_dir" "cni_bin_dir" -}}
{{- with index $settings $key -}}
{{- $wanted := . -}}
{{- $covered := false -}}
{{- range $own }}{{ if hasPrefix (printf "%s/" .) $wanted }}{{ $covered = true }}{{ end }}{{ end -}}
{{- if not $covered }}{{ $own = append $own (ternary $wanted (dir $wanted) (eq (dir $wanted) "/")) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- uniq $own | toJson -}}
{{- end -}}

{{/* The agent's settings file. Whole numbers are converted: Helm reads them as floats and prints 1e+06. */}}
{{- define "sluice.settings" -}}
{{- $all := dict "host_root" "/host" "own_namespace" .Release.Namespace -}}
{{- if .Values.ztunnel.embedded }}{{ $_ := set $all "ztunnel_ports" (list "15001" "15006") }}{{ end -}}
{{- range $key, $value := .Values.settings -}}
{{- if not (kindIs "invalid" $value) -}}
{{- if and (kindIs "float64" $value) (eq (floor $value) $value) }}{{ $value = int64 $value }}{{ end -}}
{{- $_ := set $all $key $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{/* Address and port of metrics; empty if metrics are off. */}}
{{- define "sluice.metrics" -}}
{{- $settings := include "sluice.settings" . | fromYaml -}}
{{- if hasKey $settings "metrics_address" }}{{ $settings.metrics_address }}{{ else }}0.0.0.0:15014{{ end -}}
{{- end -}}

{{- define "sluice.port" -}}
{{- include "sluice.metrics" . | regexFind "[0-9]+$" -}}
{{- end -}}

{{- define "sluice.probe" -}}
{{- $host := include "sluice.metrics" .root | trimSuffix (include "sluice.port" .root) | trimSuffix ":" | trimPrefix "[" | trimSuffix "]" -}}
httpGet:
  path: {{ .path }}
  port: metrics
  {{- if not (has $host (list "0.0.0.0" "::")) }}
  host: {{ $host | quote }}
  {{- end }}
{{- end -}}
