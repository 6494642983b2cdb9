#!/usr/bin/env bash
# Puts Prometheus and promtool into .venv/bin, for the tests of dashboards and rules (Debian, or a system that knows its packages).
set -euo pipefail
cd "$(dirname "$0")/../../.venv"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
download=(apt-get -qq -o APT::Sandbox::User=root download prometheus)
"${download[@]}" || { apt-get -qq update && "${download[@]}"; }
dpkg-deb -x prometheus_*.deb .
cp usr/bin/prometheus usr/bin/promtool "$OLDPWD/bin/"
