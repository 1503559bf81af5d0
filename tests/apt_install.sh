#!/bin/bash
# Installs Debian packages where one of the tools that they bring is missing:
#   tests/apt_install.sh "TOOL ..." PACKAGE ...
# Exit code 3, with the reason on standard output, where this machine does not allow it.
set -uo pipefail
export PATH=$PATH:/usr/sbin:/sbin
missing=
for tool in $1; do command -v "$tool" >/dev/null || missing+=" $tool"; done
shift
[[ -z $missing ]] && exit 0
[[ $(id -u) == 0 ]] || { echo "$missing: missing, and installing needs root"; exit 3; }
command -v apt-get >/dev/null || { echo "$missing: missing, and there is no apt-get"; exit 3; }
quick=(-qq -o Acquire::Retries=1 -o Acquire::http::Timeout=20 -o Acquire::https::Timeout=20)
if apt-get "${quick[@]}" update >&2 &&
  DEBIAN_FRONTEND=noninteractive apt-get "${quick[@]}" install -y "$@" >&2; then exit 0; fi
echo "apt-get could not install $* ($missing: missing)"
exit 3
