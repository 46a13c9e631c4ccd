#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Flavour k3s: k3s by its own installer at one version, then, on the server, Sluice by its chart with the embedded ztunnel.
# Fetches from get.k3s.io, GitHub and get.helm.sh. Safe to repeat.
#   usage: k3s.sh server|agent NODE_IP SERVER_IP TOKEN [CHART]   CHART: the directory deploy/chart/sluice, on the server
# $SLUICE_ARCHIVE: the image that `make image` wrote (build/image/sluice.oci.tar), for every node; k3s imports it at its start.
set -eu
fail() { echo "k3s: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "not root; run as root"
usage="usage: k3s.sh server|agent NODE_IP SERVER_IP TOKEN [CHART]"
role=${1:?$usage} ip=${2:?$usage} server=${3:?$usage} token=${4:?$usage} chart=${5:-}
k3s=v1.31.4+k3s1 helm=v3.16.4
export PATH="$PATH:/usr/local/bin" KUBECONFIG=/etc/rancher/k3s/k3s.yaml

# k3s brings its own containerd; the agent would find two runtimes.
systemctl disable -q --now containerd 2>/dev/null || :

images=/var/lib/rancher/k3s/agent/images
mkdir -p $images
[ -z "${SLUICE_ARCHIVE:-}" ] || cp "$SLUICE_ARCHIVE" $images/sluice.tar

# The interface is named: the first one of a Vagrant machine is the same address on every node.
interface=$(ip -o -4 address show | awk -v ip="$ip" 'index($4, ip "/") == 1 {print $2; exit}')
[ -n "$interface" ] || fail "no interface has the address $ip"
export INSTALL_K3S_VERSION=$k3s K3S_TOKEN="$token"
common="--node-ip $ip --flannel-iface $interface"
installer=$(mktemp)
curl -sfL -o "$installer" https://get.k3s.io || fail "https://get.k3s.io cannot be fetched"
case $role in
server) INSTALL_K3S_EXEC="server --flannel-backend=vxlan --disable=traefik,metrics-server $common" sh "$installer" ;;
agent) K3S_URL=https://$server:6443 INSTALL_K3S_EXEC="agent $common" sh "$installer" ;;
*) fail "$role: server or agent" ;;
esac || fail "the installer failed; journalctl -u k3s, or -u k3s-agent on a worker, tells more"
rm -f "$installer"

[ -n "$chart" ] || exit 0
if [ "$(helm version --template '{{.Version}}' 2>/dev/null)" != $helm ]; then
    url=https://get.helm.sh/helm-$helm-linux-$(dpkg --print-architecture).tar.gz
    curl -sfL "$url" | tar -xz -C /usr/local/bin --strip-components 1 --wildcards '*/helm' || fail "$url cannot be fetched"
fi
helm upgrade --install sluice "$chart" --namespace sluice-system --create-namespace \
    --set platform=k3s --set ztunnel.embedded=true || fail "helm failed"
echo "k3s: Sluice is installed; watch it with: kubectl -n sluice-system get pods -o wide"
