#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Forwarding, and the routes to the pods of the other nodes: now, and after every boot. Safe to repeat.
#   usage: network.sh [SUBNET=GATEWAY]...      as in 10.244.2.0/24=192.168.61.12
set -eu
fail() { echo "network: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "not root; run as root"
unit=/etc/systemd/system/sluice-lab-network.service
{
    printf '[Unit]\nDescription=Routes to the pods of the other nodes\nAfter=network-online.target\nWants=network-online.target\n\n'
    printf '[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/sbin/sysctl -qw net.ipv4.ip_forward=1\n'
    for each in "$@"; do
        case $each in *.*/*=*.*) ;; *) fail "'$each': SUBNET=GATEWAY is needed" ;; esac
        echo "ExecStart=/sbin/ip route replace ${each%=*} via ${each#*=}"
    done
    printf '\n[Install]\nWantedBy=multi-user.target\n'
} >"$unit.part"
if cmp -s "$unit.part" "$unit" && systemctl is-active -q sluice-lab-network 2>/dev/null; then
    rm "$unit.part"
    exit
fi
mv "$unit.part" "$unit"
systemctl daemon-reload
systemctl enable -q sluice-lab-network
systemctl restart sluice-lab-network || fail "systemctl status sluice-lab-network tells more"
