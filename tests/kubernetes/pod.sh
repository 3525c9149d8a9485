#!/usr/bin/env bash
# A container as the manifests ask for it, of what this machine has: namespaces of its own, uid 1000 without any
# capability, a read-only root file system. Run it as root under `unshare`; it becomes the command.
#
# usage: pod.sh REPOSITORY STATE COMMAND...
#   STATE/ssh     what the MPI operator's Secret holds      STATE/runs   the claim
#   STATE/hosts   /etc/hosts, in place of DNS               STATE/tmp    the emptyDir of /tmp
#   STATE/hostname
#
# What it cannot be: the image. /usr and the libraries are this machine's, /opt/job is the repository.
set -euo pipefail
repository=$1 state=$2
shift 2
kubernetes=$repository/launch/kubernetes
environment=$(readlink -f "$repository/.venv")

root=$(mktemp -d)
mount -t tmpfs -o mode=755 root "$root"
for entry in /*; do
  name=${entry#/}
  if [[ -L $entry ]]; then
    cp -P "$entry" "$root/"
  elif [[ -d $entry && ! $name =~ ^(proc|home|root|opt|tmp|runs)$ ]]; then
    mkdir "$root/$name"
    mount --rbind "$entry" "$root/$name"
    mount -o remount,bind,ro "$root/$name" 2>/dev/null || true # /sys and /dev may refuse; nobody writes to them here
  fi
done
mkdir -p "$root"/{proc,tmp,runs,opt/job} "$root/home/mpiuser/.ssh"
mount -t proc proc "$root/proc"
mount --rbind "$repository" "$root/opt/job"

chown 1000:1000 "$state"/{runs,tmp}
mount --bind "$state/runs" "$root/runs"
mount --bind "$state/tmp" "$root/tmp"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
# The environment's scripts name the Python by the path that they were installed under, and that one may lie where
# uid 1000 may not go.
for folder in "$environment" "$("$environment/bin/python" -c 'import sys; print(sys.base_prefix)')"; do
  if [[ ! -e $root$folder ]]; then
    mkdir -p "$root$folder"
    mount --bind "$folder" "$root$folder"
  fi
done

# As the kubelet lays out a Secret for a pod with fsGroup 1000: root's, readable, links into a folder that it can swap.
mount -t tmpfs -o mode=3777,gid=1000 secret "$root/home/mpiuser/.ssh"
mkdir "$root/home/mpiuser/.ssh/..data"
cp "$state"/ssh/* "$root/home/mpiuser/.ssh/..data/"
chown -R 0:1000 "$root/home/mpiuser/.ssh/..data"
chmod 644 "$root"/home/mpiuser/.ssh/..data/*
for file in id_rsa id_rsa.pub authorized_keys; do ln -s "..data/$file" "$root/home/mpiuser/.ssh/$file"; done
mount -o remount,ro "$root/home/mpiuser/.ssh"

# What the image has, by the contract between Dockerfile and manifests.
cp "$kubernetes/sshd_config" "$root/home/mpiuser/.sshd_config"
mount -t tmpfs -o mode=755 etc "$root/etc/ssh"
mkdir "$root/etc/ssh/ssh_config.d"
echo 'Include /etc/ssh/ssh_config.d/*.conf' >"$root/etc/ssh/ssh_config"
cp "$kubernetes/ssh_config" "$root/etc/ssh/ssh_config.d/job.conf"
printf 'root:x:0:0::/root:/bin/bash\nmpiuser:x:1000:1000::/home/mpiuser:/bin/bash\n' >"$state/passwd"
mount --bind "$state/passwd" "$root/etc/passwd"
mount --bind "$state/hosts" "$root/etc/hosts"
hostname "$(cat "$state/hostname")"

mount -o remount,ro "$root"
ip link set lo up # an interface towards other pods is for the caller to give
exec chroot "$root" /usr/bin/setpriv --reuid 1000 --regid 1000 --clear-groups --no-new-privs \
  --bounding-set=-all --inh-caps=-all --ambient-caps=-all \
  env -i -C /opt/job HOME=/home/mpiuser PATH=/opt/job/.venv/bin:/usr/local/bin:/usr/bin:/bin "$@"
