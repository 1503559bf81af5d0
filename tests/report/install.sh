#!/bin/bash
# Installs Chromium for the report's tests where it is missing. Exit code 3, with the reason on standard output, where this
# machine does not allow it.
set -uo pipefail
missing=
for tool in chromium chromedriver; do command -v $tool >/dev/null || missing+=" $tool"; done
[[ -z $missing ]] && exit 0
[[ $(id -u) == 0 ]] || { echo "$missing: missing, and installing needs root"; exit 3; }
command -v apt-get >/dev/null || { echo "$missing: missing, and there is no apt-get"; exit 3; }
quick=(-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20)
if apt-get "${quick[@]}" update >&2 &&
  DEBIAN_FRONTEND=noninteractive apt-get "${quick[@]}" install -y --no-install-recommends chromium chromium-driver >&2
then exit 0; fi
echo "apt-get could not install chromium and chromium-driver ($missing: missing)"
exit 3
