#!/bin/bash
# A signed apt repository out of packages: plain files for any web server.
#
#   repository.sh key KEYS NAME            makes the signing key (ed25519, no expiry) in the folder KEYS and exports its public half
#   repository.sh publish KEYS REPO DEB... adds the packages to REPO and signs its index anew
#
# On a client (as root):
#   install -m 0644 dealscale.gpg /usr/share/keyrings/dealscale.gpg
#   printf 'Types: deb\nURIs: https://HOST/REPO\nSuites: stable\nComponents: main\nSigned-By: /usr/share/keyrings/dealscale.gpg\n' \
#     >/etc/apt/sources.list.d/dealscale.sources
#   apt update && apt install dealscale
#
# KEYS is the secret: keep it off the web server, back it up. Losing it means a new key on every client.
set -euo pipefail

die() { printf '%s\n' "error: $*" >&2; exit 1; }
usage() { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }

# The repository's suite and component: one package for every release of Debian that it supports.
SUITE=stable
COMPONENT=main

sign() { gpg --homedir "$keys" --batch --yes --pinentry-mode loopback --passphrase '' --digest-algo SHA512 "$@"; }

# The agent that gpg starts by itself has nothing more to do.
trap '[ -z "${keys:-}" ] || gpgconf --homedir "$keys" --kill gpg-agent 2>/dev/null || true' EXIT

case ${1:-} in
  key)
    [ $# = 3 ] || usage
    keys=$2
    mkdir -p "$keys"
    chmod 0700 "$keys"
    [ ! -e "$keys/dealscale.gpg" ] || die "$keys has a key already"
    sign --quick-generate-key "$3" ed25519 sign never
    sign --export >"$keys/dealscale.gpg"
    echo "public key, for the clients: $keys/dealscale.gpg"
    ;;
  publish)
    [ $# -ge 4 ] || usage
    keys=$2 repo=$3
    shift 3
    [ -e "$keys/dealscale.gpg" ] || die "no key in $keys: repository.sh key $keys NAME"
    pool=$repo/pool/$COMPONENT dists=$repo/dists/$SUITE
    mkdir -p "$pool" "$dists"
    for deb in "$@"; do
      file=$pool/$(basename "$deb")
      # A version that was published is never changed: clients compare hashes.
      if [ -e "$file" ]; then cmp -s "$deb" "$file" || die "$(basename "$deb") was published with other contents: raise the version"
      else install -m 0644 "$deb" "$file"; fi
    done
    for arch in amd64; do
      mkdir -p "$dists/$COMPONENT/binary-$arch"
      (cd "$repo" && apt-ftparchive --arch "$arch" packages "pool/$COMPONENT") >"$dists/$COMPONENT/binary-$arch/Packages"
      gzip -9kfn "$dists/$COMPONENT/binary-$arch/Packages"
    done
    apt-ftparchive -o "APT::FTPArchive::Release::Origin=dealscale" -o "APT::FTPArchive::Release::Suite=$SUITE" \
      -o "APT::FTPArchive::Release::Codename=$SUITE" -o "APT::FTPArchive::Release::Architectures=amd64" \
      -o "APT::FTPArchive::Release::Components=$COMPONENT" release "$dists" >"$dists.new"
    mv "$dists.new" "$dists/Release"
    sign --clearsign -o "$dists/InRelease" "$dists/Release"
    sign --armor --detach-sign -o "$dists/Release.gpg" "$dists/Release"
    echo "signed: $dists"
    ;;
  *) usage ;;
esac
