#!/usr/bin/env bash
# Installs Debian's chromium, for the tests that drive the chat page, unless it is there. Needs root only to install.
set -euo pipefail
found() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
if browser=$(found); then
  echo "browser: $browser was there"
  exit 0
fi
log=$(mktemp)
trap 'rm -f "$log"' EXIT
as_root=$([ "$(id -u)" = 0 ] || echo sudo)
if ! { $as_root apt-get update && $as_root env DEBIAN_FRONTEND=noninteractive \
  apt-get install --yes --no-install-recommends chromium fonts-dejavu-core; } >"$log" 2>&1; then
  tail -n 5 "$log" >&2
  echo "browser: chromium could not be installed with apt-get" >&2
  exit 1
fi
echo "browser: installed $(found)"
