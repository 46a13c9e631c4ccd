#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
# The guided script: what a newcomer does with the lab, and what `make test` and `make test-vm` do with theirs. It prints
# every command as it was typed on a node with what it said, then whether what it claims about it held; exit 1 if not.
#   usage: guide.sh [CHAPTER...]       chapters: deploy traffic primary upgrade reboot uninstall; without: all, in order
# $GUIDE_ON        a program: GUIDE_ON NODE COMMAND runs a shell command as root on a node (ssh, or nsenter in the tests)
# $GUIDE_ARCHIVE   tools/dist DIRECTORY made it; $GUIDE_PREVIOUS: tools/dist --ref $(cat tools/previous) DIRECTORY
# $GUIDE_FLAVOUR   standalone (default) or k3s; $GUIDE_NODES: "server worker1 worker2", the second and third have traffic
set -u
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
read -ra nodes <<<"${GUIDE_NODES:-server worker1 worker2}"
on=${GUIDE_ON:?a program that runs a command on a node} archive=${GUIDE_ARCHIVE:?} previous=${GUIDE_PREVIOUS:?}
flavour=${GUIDE_FLAVOUR:-standalone} patience=${GUIDE_PATIENCE:-60} # seconds that anything may take
server=${nodes[0]} worker1=${nodes[1]} worker2=${nodes[2]}
client=$worker1:shop/client web=$worker2:shop/web # NODE:NAMESPACE/NAME
failed=0 said='' code=0

title() { printf '\n== %s\n' "$*"; }
tell() { printf '%s\n' "$*"; }
quiet() { "$on" "$@" 2>&1; }

# NODE COMMAND: shown as it is typed, with its output and, if it is not 0, its exit code.
run() {
    printf '%s# %s\n' "$1" "$2"
    said=$(quiet "$1" "$2") && code=0 || code=$?
    [ -z "$said" ] || printf '%s\n' "$said"
    [ "$code" = 0 ] || printf '[exit %s]\n' "$code"
}

# CLAIM COMMAND...: a check of the script's own.
check() {
    local claim=$1
    shift
    if "$@"; then printf '  ok   %s\n' "$claim"; else
        printf '  FAIL %s\n' "$claim"
        failed=$((failed + 1))
    fi
}
equal() { [ "$1" = "$2" ]; }
less() { [ "${1:-0}" -lt "${2:-0}" ]; }
says() { grep -Eq -- "$1" <<<"$said"; }
# NODE COMMAND: asked again until it ends with 0.
await() {
    local until=$((SECONDS + patience))
    until quiet "$1" "$2" >/dev/null; do
        [ $SECONDS -lt $until ] || return 1
        sleep 0.1
    done
}
# NODE FILE PATH
send() { "$on" "$1" "mkdir -p ${3%/*} && cat >$3" <"$2"; }
ready() { await "$1" "$sluice status | grep -Eq '^Ready: +yes' && $sluice status | grep -Eq '^Problem: +none'"; }
runs() { await "$1" "$sluice status | grep -Eq '^Version: +$2\$'"; } # NODE VERSION
# NODE FATE: connections of the node's pods, by the agent's own account.
account() { quiet "$1" "$sluice status" | awk -v fate="$2" '$1 == fate ":" {print $2; exit}'; }
right() { await "$1" "$sluice verify --all"; }

# The client opens a connection after the other; ok and failed ones are counted in its pod.
loop() { echo "ok=0 failed=0; while :; do if timeout 10 wget -q -O /dev/null http://$1:8080/; then ok=\$((ok+1)); else failed=\$((failed+1)); fi; echo \$ok \$failed >/tmp/count; done"; }
count() { # FIELD; asked again when it was just being written
    local found
    for _ in 1 2 3 4 5; do
        found=$(pod_exec "$client" cat /tmp/count | awk -v field="$1" 'NF == 2 && $1 ~ /^[0-9]+$/ {print $field}')
        [ -z "$found" ] || break
        sleep 0.1
    done
    echo "${found:--1}"
}
more() { # COUNT: that many connections more
    local now until=$((SECONDS + patience))
    now=$(count 1)
    until less $((now + $1)) "$(count 1)"; do
        [ $SECONDS -lt $until ] || return 1
        sleep 0.1
    done
}
none_failed() { equal "$(count 2)" 0; }
none_leaked() { for node in "$worker1" "$worker2"; do equal "$(account "$node" leaked)" 0 || return; done; }

# What differs by flavour: how `sluice` is called on a node, where CNI configurations are, and the functions of that file.
sluice='' conf='' new_in_primary=''
# shellcheck source=flavour/standalone.sh
. "$here/flavour/$flavour.sh" || exit 2

deploy() {
    title "Deploy: the agent, its proxy and its CNI plugin on every node"
    for node in "${nodes[@]}"; do install_on "$node" "$archive"; done
    for node in "${nodes[@]}"; do check "$node: the agent is ready, and a ztunnel is connected" ready "$node"; done
    run "$worker1" "$sluice status"
    run "$worker1" "ls $conf"
    check "$worker1: our CNI configuration is the first" says '^0[0-9]-sluice.conflist'
}

traffic() {
    title "Traffic across nodes: a web server in a pod of $worker2, a client in one of $worker1 that connects without pause"
    pod_run "$web" "httpd -f -p 8080 -h /www"
    address=$(pod_ip "$web")
    pod_run "$client" "$(loop "$address")"
    await "$worker1" "$sluice pods | grep -Eq 'shop +client +enabled'"
    run "$worker1" "$sluice pods"
    check "shop/client is captured" says 'shop +client +enabled'
    run "$worker2" "$sluice pods"
    check "shop/web is captured" says 'shop +web +enabled'
    check "the client gets its pages" more 20
    run "$worker1" "$sluice connections shop/client -n 3"
    check "$worker1: what the client opens is captured" says "out .*$address:8080.* captured"
    run "$worker2" "$sluice connections shop/web -n 3"
    check "$worker2: what reaches the server is captured" says ' in .* captured'
    run "$worker1" "$sluice status | grep -A3 Accounting"
    check "no connection leaked, by the account of both nodes" none_leaked
    check "no connection failed" none_failed
}

primary() {
    title "The reconciliation check: sluice verify --all, on every node, after whatever was changed"
    for node in "${nodes[@]}"; do check "$node: exit 0" right "$node"; done
    run "$worker1" "$sluice verify --all"
    check "exit 0: all is as it should be" equal "$code" 0
    title "It is wrong when something is wrong: $server without its proxy"
    proxy_away "$server"
    run "$server" "$sluice verify --all"
    check "exit 1, and it says what" equal "$code" 1
    check "it names the proxy" says 'no ztunnel is connected'
    proxy_back "$server"
    check "$server: exit 0 again" right "$server"
    title "The primary CNI is upgraded: its configuration is written anew, with one plugin more"
    for node in "${nodes[@]}"; do upgrade_primary "$node"; done
    for node in "${nodes[@]}"; do
        check "$node: our configuration wraps the new one" await "$node" "grep -q $new_in_primary $conf/0*-sluice.conflist"
        check "$node: verify --all ends with 0" right "$node"
    done
    run "$worker1" "$sluice verify --all; echo exit \$?"
    pod_run "$worker1:shop/later" "sleep 2147483647"
    run "$worker1" "$sluice verify shop/later"
    check "a pod that was made afterwards is captured" says ' later +enabled +ok'
    pod_stop "$worker1:shop/later"
    check "meanwhile no connection failed" none_failed
}

upgrade() {
    title "Sluice itself, under traffic: back to the version before, forward, back and forward again"
    local before
    before=$(count 1)
    for node in "$worker1" "$worker2"; do switch_and_check "$node" "$previous"; done
    for node in "$worker1" "$worker2"; do switch_and_check "$node" "$archive"; done
    switch_and_check "$worker1" "$previous"
    switch_and_check "$worker1" "$archive"
    tell "$(($(count 1) - before)) connections were opened meanwhile, $(count 2) failed"
    run "$worker1" "$sluice status | grep -A3 Accounting"
    check "no connection failed" none_failed
    check "no connection leaked, by the account of both nodes" none_leaked
    for node in "${nodes[@]}"; do check "$node: verify --all ends with 0" right "$node"; done
}

switch_and_check() { # NODE ARCHIVE
    local version
    version=$(basename "$2" .tar.gz)
    version=${version#sluice-}
    switch "$1" "$2"
    check "$1 runs $version" runs "$1" "$version"
    check "$1: verify --all ends with 0" right "$1"
    check "the client goes on" more 10
}

reboot() {
    title "A node is drained and rebooted"
    pod_stop "$client"
    drain "$worker2"
    printf '%s# systemctl reboot\n' "$worker2"
    quiet "$worker2" "systemctl reboot" >/dev/null # it may end with the connection
    check "$worker2 comes back" back "$worker2"
    check "$worker2: the agent is ready" ready "$worker2"
    undrain "$worker2"
    pod_run "$web" "httpd -f -p 8080 -h /www"
    pod_run "$client" "$(loop "$(pod_ip "$web")")"
    check "the client gets its pages" more 20
    run "$worker2" "$sluice verify --all"
    check "$worker2: exit 0" equal "$code" 0
    run "$worker2" "$sluice connections shop/web -n 3"
    check "what reaches the server is captured" says ' in .* captured'
    check "no connection leaked, by the account of both nodes" none_leaked
}

# What was in memory is gone.
back() {
    local until=$((SECONDS + patience))
    while quiet "$1" "test -e /run/guide" >/dev/null; do [ $SECONDS -lt $until ] || return 1; sleep 0.1; done
    await "$1" "test ! -e /run/guide"
}

uninstall() {
    title "Uninstall: the proxy keeps what it has until the rules are gone; pods go on without"
    for node in "${nodes[@]}"; do uninstall_from "$node"; done
    for node in "${nodes[@]}"; do
        check "$node: no CNI configuration names the plugin" equal "$(quiet "$node" "grep -l sluice-cni $conf/*")" ''
    done
    check "the client gets its pages, uncaptured now" more 20
    pod_run "$worker1:shop/after" "sleep 2147483647"
    check "pods are made as before Sluice" equal "$code" 0
    pod_stop "$worker1:shop/after" "$client" "$web"
}

chapters=("$@")
[ $# != 0 ] || chapters=(deploy traffic primary upgrade reboot uninstall)
for chapter in "${chapters[@]}"; do
    case $chapter in
    deploy | traffic | primary | upgrade | reboot | uninstall)
        $chapter
        [ $failed = 0 ] || break # what follows relies on it
        ;;
    *) echo "guide: no chapter $chapter" >&2; exit 2 ;;
    esac
done
printf '\n'
if [ $failed != 0 ]; then tell "$failed claims did not hold."; exit 1; fi
tell "Every claim held."
