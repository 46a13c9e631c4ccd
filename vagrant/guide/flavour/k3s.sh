# SPDX-License-Identifier: Apache-2.0
# k3s, with Sluice by its chart (provision/k3s.sh has installed it); pods by kubectl on the server. For guide.sh.
# It needs the cluster's images from their registries, so no test runs it.
# shellcheck shell=bash disable=SC2034,SC2154
sluice='k3s crictl exec $(k3s crictl ps -q --label io.kubernetes.container.name=agent) sluice'
conf=/var/lib/rancher/k3s/agent/etc/cni/net.d
new_in_primary=flannel # k3s writes flannel's list anew at every start
image=docker.io/library/busybox:1.36
kubectl="k3s kubectl"

# A pod is NODE:NAMESPACE/NAME.
pod_run() { # POD COMMAND
    local key=${1#*:} place="{\"spec\":{\"nodeName\":\"${1%%:*}\"}}"
    quiet "$server" "$kubectl create namespace ${key%/*}" >/dev/null
    run "$server" "$kubectl -n ${key%/*} run ${key#*/} --image=$image --labels=istio.io/dataplane-mode=ambient --overrides='$place' --command -- sh -c 'mkdir -p /www; echo hello >/www/index.html; $2'"
    quiet "$server" "$kubectl -n ${key%/*} wait --for=condition=Ready pod/${key#*/} --timeout=${patience}s" >/dev/null
}
pod_exec() { # POD COMMAND...
    local key=${1#*:}
    shift
    quiet "$server" "$kubectl -n ${key%/*} exec ${key#*/} -- $*"
}
pod_stop() {
    local each key
    for each; do key=${each#*:} && run "$server" "$kubectl -n ${key%/*} delete pod ${key#*/} --grace-period=1"; done
}
pod_ip() {
    local key=${1#*:}
    quiet "$server" "$kubectl -n ${key%/*} get pod ${key#*/} -o jsonpath='{.status.podIP}'"
}

install_on() { # what provision/k3s.sh did is waited for
    quiet "$1" "touch /run/guide"
    [ "$1" != "$server" ] || run "$server" "$kubectl -n sluice-system rollout status daemonset --timeout=${patience}s"
}

# Both DaemonSets roll over all nodes; which version the images are of is the chart's matter.
switch() {
    run "$server" "$kubectl -n sluice-system rollout restart daemonset"
    run "$server" "$kubectl -n sluice-system rollout status daemonset --timeout=${patience}s"
}
runs() { ready "$1"; }

# The node has no proxy while its DaemonSet selects another label.
proxy_away() {
    run "$server" "$kubectl -n sluice-system patch daemonset sluice-ztunnel --type=merge -p '{\"spec\":{\"template\":{\"spec\":{\"nodeSelector\":{\"guide/away\":\"yes\"}}}}}'"
    await "$1" "$sluice status | grep -q '^Ztunnels: *0\$'"
}
proxy_back() {
    run "$server" "$kubectl -n sluice-system patch daemonset sluice-ztunnel --type=json -p '[{\"op\":\"remove\",\"path\":\"/spec/template/spec/nodeSelector/guide~1away\"}]'"
}

upgrade_primary() { [ "$1" = "$server" ] && run "$1" "systemctl restart k3s" || run "$1" "systemctl restart k3s-agent"; }

drain() { run "$server" "$kubectl drain $1 --ignore-daemonsets --delete-emptydir-data --force --grace-period=1"; }
undrain() { run "$server" "$kubectl uncordon $1"; }

uninstall_from() {
    [ "$1" != "$server" ] || run "$server" "helm -n sluice-system uninstall sluice --wait"
    run "$1" "systemctl is-active k3s k3s-agent | grep -c '^active'"
}
