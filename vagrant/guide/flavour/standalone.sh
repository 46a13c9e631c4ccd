# SPDX-License-Identifier: Apache-2.0
# Nodes with Debian's packages alone: Sluice from an archive, run by systemd; pods by vagrant/node/pod. For guide.sh.
# shellcheck shell=bash disable=SC2034,SC2154
sluice=sluice conf=/etc/cni/net.d
new_in_primary=tuning # the plugin that its release 2 has more
lab=/opt/sluice-lab # what is sent to a node

# A pod is NODE:NAMESPACE/NAME.
pod_run() { # POD COMMAND
    run "${1%%:*}" "pod run ${1#*:} --enrolled -- sh -c '$2'"
}
pod_exec() { # POD COMMAND...
    local pod=$1
    shift
    quiet "${pod%%:*}" "pod exec ${pod#*:} -- $*"
}
pod_stop() { for each; do run "${each%%:*}" "pod stop ${each#*:}"; done; }
pod_ip() { quiet "${1%%:*}" "pod ip ${1#*:}"; }

place() { # NODE ARCHIVE: puts it there and makes it current; what runs goes on running
    send "$1" "$2" "$lab/$(basename "$2")"
    run "$1" "$lab/sluice.sh '$lab/$(basename "$2")'"
}
install_on() { # NODE ARCHIVE
    for each in "$here"/../provision/{sluice,cni}.sh; do
        send "$1" "$each" "$lab/$(basename "$each")"
        quiet "$1" "chmod +x $lab/*.sh; touch /run/guide"
    done
    place "$1" "$2"
}

# The agent first: rules stay while none runs. Then the proxy, with a second one beside it for as long as it is restarted.
switch() { # NODE ARCHIVE
    place "$1" "$2"
    run "$1" "systemctl restart sluice"
    ready "$1"
    run "$1" "systemctl start sluice-ztunnel@next"
    ztunnels "$1" 2
    run "$1" "systemctl restart sluice-ztunnel"
    ztunnels "$1" 2
    run "$1" "systemctl stop sluice-ztunnel@next"
    ztunnels "$1" 1
}
ztunnels() { await "$1" "sluice status | grep -q '^Ztunnels: *$2\$' && sluice pods -o json | grep -c '\"state\": \"pending\"' | grep -qx 0"; }

proxy_away() {
    run "$1" "systemctl stop sluice-ztunnel"
    await "$1" "sluice status | grep -q '^Ztunnels: *0\$'"
}
proxy_back() { run "$1" "systemctl start sluice-ztunnel"; }

upgrade_primary() {
    local number=0
    for each in "${nodes[@]}"; do number=$((number + 1)) && [ "$each" != "$1" ] || break; done
    run "$1" "$lab/cni.sh 10.244.$number.0/24 2"
}

drain() { run "$1" "pod stop --all"; }
undrain() { :; }

uninstall_from() {
    run "$1" "systemctl disable -q --now sluice"
    run "$1" "sluice uninstall --config /etc/sluice.yaml"
    run "$1" "sluice uncapture --all"
    run "$1" "systemctl disable -q --now sluice-ztunnel"
}
