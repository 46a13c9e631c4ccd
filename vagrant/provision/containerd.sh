#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# containerd's configuration as a node of Kubernetes has it: CNI in the usual directories. The image that sandboxes are made
# of is one that `pod` writes, for a lab asks no registry. Safe to repeat: containerd is restarted only for another file.
set -eu
fail() { echo "containerd: $*" >&2; exit 1; }
[ "$(id -u)" = 0 ] || fail "not root; run as root"
command -v containerd >/dev/null || fail "containerd is missing; run packages.sh first"
file=/etc/containerd/config.toml
mkdir -p /etc/containerd /etc/cni/net.d /opt/cni/bin
cat >$file.part <<'END'
version = 2
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/pause:local"
  disable_tcp_service = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
END
# Pods get what the node itself leaves, as best-effort pods of a kubelet do (cpu.shares 2).
extra=/etc/systemd/system/containerd.service.d/pods.conf
if [ ! -e $extra ]; then
    mkdir -p "${extra%/*}"
    printf '[Service]\nExecStartPost=-/bin/sh -c "cd /sys/fs/cgroup && echo +cpu >cgroup.subtree_control && mkdir -p kubepods && echo 1 >kubepods/cpu.weight"\n' >$extra
    systemctl daemon-reload
    rm -f $file
fi
if cmp -s $file.part $file; then
    rm $file.part
    systemctl start containerd || fail "containerd does not start; journalctl -u containerd tells more"
else
    mv $file.part $file
    systemctl restart containerd || fail "containerd does not start; journalctl -u containerd tells more"
fi
systemctl is-enabled -q containerd || systemctl enable -q containerd
