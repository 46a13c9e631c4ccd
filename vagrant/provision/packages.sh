#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What a node needs of Debian 12: runtime, reference CNI plugins, what Sluice runs on. Safe to repeat; asks no mirror
# when nothing is missing. Runs as root on a node, and while the image of the virtual machines is made.
#   usage: packages.sh [--list]
set -eu
fail() { echo "packages: $*" >&2; exit 1; }
runtime="containerd runc containernetworking-plugins busybox-static"
sluice="python3 python3-yaml python3-h11 python3-h2 python3-cryptography python3-psutil python3-pyroute2 libbpf1 nftables iptables ipset iproute2 util-linux kmod procps"
lab="python3-grpcio curl ca-certificates"  # pods over CRI, and looking around
packages="$runtime $sluice $lab"
if [ "${1:-}" = --list ]; then echo "$packages" | tr ' ' '\n'; exit; fi

missing() {
    for each in $packages; do
        dpkg-query -W -f='${Status}\n' "$each" 2>/dev/null | grep -q '^install ok installed$' || printf '%s ' "$each"
    done
}
want=$(missing)
if [ -z "$want" ]; then echo "packages: all there"; exit; fi
[ "$(id -u)" = 0 ] || fail "not root; run as root"
echo "packages: installing $want"
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
{ apt-get update -q && apt-get install -y -q --no-install-recommends $want; } >"$log" 2>&1 ||
    fail "apt-get failed: $(grep -m1 '^E:' "$log" || tail -n1 "$log") (log: $log)"
rm -f "$log"
