#!/bin/sh
# Turns on etcd's authentication, with a user for the manager that reaches the keys below gauntlet/ only. Does nothing if it is on already.
set -eu

if ETCDCTL_USER=root ETCDCTL_PASSWORD="$ROOT_PASSWORD" etcdctl auth status 2>/dev/null | grep -q 'Authentication Status: true'; then
    exit 0
fi

# Passwords on standard input: other processes can read arguments. Steps of an interrupted run exist already.
add_user() {
    etcdctl user get "$1" >/dev/null 2>&1 && etcdctl user delete "$1"
    printf '%s\n' "$2" | etcdctl user add "$1" --interactive=false
}

add_user root "$ROOT_PASSWORD"
etcdctl user grant-role root root
etcdctl role get gauntlet >/dev/null 2>&1 || etcdctl role add gauntlet
etcdctl role grant-permission gauntlet --prefix=true readwrite gauntlet/
add_user gauntlet "$MANAGER_PASSWORD"
etcdctl user grant-role gauntlet gauntlet
etcdctl auth enable
