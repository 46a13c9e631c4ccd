#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Puts the Sluice of an archive of tools/dist on this node, beside those that are there, and makes it the current one.
# What runs goes on running until its service is restarted. Safe to repeat.
#   usage: sluice.sh ARCHIVE      $SLUICE_BACKEND: auto
set -eu
fail() { echo "sluice: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "not root; run as root"
archive=${1:?usage: sluice.sh ARCHIVE}
version=$(basename "$archive" .tar.gz) && version=${version#sluice-}
home=/opt/sluice
mkdir -p $home
sum=$(sha256sum <"$archive") || fail "$archive cannot be read"
if [ "$(cat "$home/$version/.archive" 2>/dev/null)" != "$sum" ]; then  # of a version in the making there are several
    rm -rf "$home/.part" && mkdir "$home/.part"
    tar -xzf "$archive" -C "$home/.part" || fail "$archive: not an archive of tools/dist"
    echo "$sum" >"$home/.part/sluice-$version/.archive"
    rm -rf "${home:?}/$version"
    mv "$home/.part/sluice-$version" "$home/$version" && rmdir "$home/.part"
fi
ln -sfn "$version" $home/.current && mv -T $home/.current $home/current
mkdir -p /usr/local/lib/sluice /usr/local/bin
ln -sfn $home/current/bin/sluice /usr/local/bin/sluice
ln -sfn $home/current/bin/sluice-cni /usr/local/lib/sluice/sluice-cni
ln -sfn $home/current/node/pod /usr/local/bin/pod
if [ ! -e /etc/sluice.yaml ]; then
    cat >/etc/sluice.yaml <<END
# sluice settings: \`sluice agent --help\` lists all
backend: ${SLUICE_BACKEND:-auto}
kube_server: none
own_namespace: sluice-system
cni_install: own
ztunnel_ports: ["15001", "15006"]
metrics_address: 0.0.0.0:15014
END
fi
changed=
for each in "$home"/current/systemd/*; do
    cmp -s "$each" "/etc/systemd/system/${each##*/}" || { cp "$each" /etc/systemd/system/ && changed=yes; }
done
[ -z "$changed" ] || systemctl daemon-reload
systemctl is-enabled -q sluice sluice-ztunnel 2>/dev/null || systemctl enable -q sluice sluice-ztunnel
systemctl start sluice sluice-ztunnel
echo "sluice: $version is current"
