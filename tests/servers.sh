#!/bin/sh
# Install what the tests start for themselves: PostgreSQL, Redis, and `ip` for network namespaces.
# What is missing and can't be installed is said loudly; its tests are then skipped, loudly too.
set -u
missing=""
ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 || command -v initdb >/dev/null || missing="$missing postgresql"
command -v redis-server >/dev/null || missing="$missing redis-server"
command -v ip >/dev/null || [ -x /usr/sbin/ip ] || missing="$missing iproute2"
[ -z "$missing" ] && exit 0
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
	echo "installing$missing for the tests"
	# A cluster of the system's own is not wanted: tests make theirs.
	mkdir -p /etc/postgresql-common
	[ -e /etc/postgresql-common/createcluster.conf ] ||
		echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -qq --no-install-recommends $missing >/dev/null && exit 0
fi
echo "=====================================================================" >&2
echo "NOT INSTALLED:$missing. Tests that need them will be SKIPPED." >&2
echo "On Debian or Ubuntu: sudo apt-get install$missing" >&2
echo "=====================================================================" >&2
[ -z "${CI:-}" ]
