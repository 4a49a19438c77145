# install-packages.sh ROOT PACKAGE...
#
# Installs Debian packages for their binaries: none of their services, nor of the packages they depend on, is started or enabled.
# Once begun it goes on to the end, also without the process that started it. ROOT is empty except in tests.
set -eu
root=$1
shift
# apt-get and dpkg inherit this: neither Ctrl-C nor a closed terminal ends them half-way.
trap '' HUP INT TERM

mkdir -p "$root/run/lock" "$root/usr/sbin"
lock=$root/run/lock/gauntlet-install-packages
exec 9>"$lock"
# apt-get and dpkg inherit the descriptor: the lock is held until the last of them has ended.
flock 9

# Refuses to start services while the lock is held. One that a power failure left behind removes itself when it is asked next.
policy=$root/usr/sbin/policy-rc.d
if [ ! -e "$policy" ] || grep -q gauntlet-install-packages "$policy"; then
    printf '#!/bin/sh\nflock --nonblock "%s" true || exit 101\nrm -f "%s"\n' "$lock" "$policy" >"$policy.new"
    chmod 755 "$policy.new"
    mv -f "$policy.new" "$policy"
    ours=$policy
else
    ours=
fi

# The links by which systemd and sysvinit start services at boot.
enabled() {
    find "$root/etc/systemd/system" "$root"/etc/rc[2345].d -type l \( -path '*.wants/*' -o -path '*.requires/*' -o -path '*.d/S*' \) \
        2>/dev/null | sort
}
before=$(mktemp)
enabled >"$before"

finish() {
    enabled | comm -13 "$before" - | while read -r link; do
        name=${link##*/}
        case $link in
        */rc?.d/*) mv -f "$link" "${link%/*}/K01${name#S??}" ;;
        *)
            # Stops it too, where a policy-rc.d that was there before let it start.
            if [ -d "$root/run/systemd/system" ]; then systemctl disable --quiet --now "$name" || true; fi
            rm -f "$link"
            ;;
        esac
    done
    rm -f "$before" ${ours:+"$ours"}
}
trap finish EXIT

export DEBIAN_FRONTEND=noninteractive
apt-get -q update || echo "apt-get update failed: going on with the package lists that are there"
apt-get -q -y -o DPkg::Lock::Timeout=600 install --no-install-recommends "$@"
