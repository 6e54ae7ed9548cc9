#!/bin/sh
# What the tests of launches across hosts need beside Python packages: ssh servers, pdsh, Slurm, network tools.
# On Debian and Ubuntu as root it installs what is missing; elsewhere it says so, and those tests skip with a reason.
set -eu

missing=
while read -r command package; do
    PATH="$PATH:/usr/sbin:/sbin" command -v "$command" >/dev/null || missing="$missing $package"
done <<'TABLE'
ssh openssh-client
sshd openssh-server
pdsh pdsh
munged munge
slurmctld slurmctld
slurmd slurmd
srun slurm-client
ip iproute2
nft nftables
ps procps
TABLE

if [ -z "$missing" ]; then
    exit 0
elif [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "tests that need other hosts will skip: not root, or no apt-get, to install$missing" >&2
    exit 0
fi

# The tests start their own servers on their own ports; Debian would start its own for each package, and this refuses.
policy=/usr/sbin/policy-rc.d
if [ ! -e $policy ]; then
    trap 'rm -f $policy' EXIT
    printf '#!/bin/sh\nexit 101\n' >$policy
    chmod 755 $policy
fi

export DEBIAN_FRONTEND=noninteractive
apt() { apt-get -qq -o DPkg::Lock::Timeout=300 -o Acquire::Retries=3 "$@" >/dev/null; }
# shellcheck disable=SC2086  # a list of words
if ! { apt update && apt install -y --no-install-recommends $missing; }; then
    echo "tests that need other hosts will skip: apt-get could not install$missing" >&2
fi
