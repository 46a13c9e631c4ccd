#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What a primary CNI leaves on its node: the reference plugins and a list that gives pods addresses. Safe to repeat.
#   usage: cni.sh SUBNET [RELEASE]      RELEASE 2 is an upgrade of it: its list has one plugin more (tuning)
set -eu
fail() { echo "cni: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "not root; run as root"
subnet=${1:?usage: cni.sh SUBNET [RELEASE]} release=${2:-1}
plugins=/usr/lib/cni   # Debian's containernetworking-plugins
[ -x $plugins/ptp ] || fail "$plugins/ptp is missing; apt-get install containernetworking-plugins"
case $release in 1) more= ;; 2) more=', {"type": "tuning", "sysctl": {"net.core.somaxconn": "512"}}' ;; *) fail "releases: 1, 2" ;; esac
mkdir -p /etc/cni/net.d /opt/cni/bin
for each in "$plugins"/*; do ln -sfn "$each" /opt/cni/bin/; done
file=/etc/cni/net.d/10-lab.conflist
cat >$file.part <<END
{
  "cniVersion": "1.0.0",
  "name": "lab",
  "plugins": [
    {"type": "ptp", "ipMasq": false, "ipam": {
      "type": "host-local", "ranges": [[{"subnet": "$subnet"}]], "routes": [{"dst": "0.0.0.0/0"}]}}$more
  ]
}
END
mv $file.part $file
