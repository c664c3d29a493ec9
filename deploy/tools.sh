#!/usr/bin/env bash
# Brings Prometheus and promtool, with which alerts and dashboards are tested, from Debian's archive into a directory: nothing is
# installed and no daemon started. Usage: deploy/tools.sh DIRECTORY. Ends with 0 where it cannot: the tests that want them say so.
set -euo pipefail
target=${1:?say where they go}

if command -v promtool > /dev/null && command -v prometheus > /dev/null; then exit 0; fi
if ! command -v apt-get > /dev/null || ! command -v dpkg-deb > /dev/null; then
  echo "No Debian here: promtool and prometheus are not brought; tests of alerts and dashboards skip." >&2
  exit 0
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# apt checks the package against its signed lists.
fetch() { (cd "$work" && apt-get download -qq prometheus > /dev/null 2> "$work/why"); }
fetch || { [ "$(id -u)" = 0 ] && apt-get update -qq > /dev/null 2>&1 && fetch; } || {
  echo "prometheus cannot be had from Debian ($(tail -1 "$work/why")): tests of alerts and dashboards skip." >&2
  exit 0
}
dpkg-deb -x "$work"/prometheus_*.deb "$work/unpacked"
mkdir -p "$target/bin"
install -m 755 "$work/unpacked/usr/bin/promtool" "$work/unpacked/usr/bin/prometheus" "$target/bin/"
"$target/bin/promtool" --version 2>&1 | head -1
