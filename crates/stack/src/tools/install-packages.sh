# Installs Debian packages as binaries only: no service of theirs is started now, none at the next boot.
set -eu
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi
export DEBIAN_FRONTEND=noninteractive
apt-get -q update || echo "apt-get update failed: going on with the package lists that are there"
apt-get -q -y -o DPkg::Lock::Timeout=600 install --no-install-recommends "$@"
if [ -d /run/systemd/system ]; then
    for package in "$@"; do
        for unit in $(dpkg -L "$package" | sed -n 's#.*/systemd/system/\([^/@]*\.service\)$#\1#p'); do
            systemctl disable --quiet "$unit" || true
        done
    done
fi
