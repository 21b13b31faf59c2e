//! The keys that sign references, and those that still verify.
//!
//! broker, bridge → **`keyring`**. Signing is on the relay's hot path and verification on delivery's, so both go straight to
//! aws-lc-rs; `jsonwebtoken` serves where foreign tokens come in (the bridge's accounts).
//!
//! # Invariants
//! 1. The algorithm is that of the key that `kid` names, never the token's choice: there is no `none`, and no HMAC with a
//!    public key.
//! 2. Only headers of exactly `alg`, `kid` and `typ: "JWT"` are understood; everything else (`crit`, `jku`, `jwk`, …) is refused.
//! 3. A private key leaves this module only into its own file (mode 0600), which is on disk, and its folder entry too, before
//!    the key signs anything.
//! 4. Every key of the configuration and of the folder verifies; one signs. A key is retired by removing it, once nothing
//!    open was signed with it.
//!
//! # On disk
//! ```text
//! STATE_DIR/signing/active.pem   PKCS#8 of the Ed25519 key that signs, made at the first start
//! STATE_DIR/signing/*.pem        former ones (rotation: rename active.pem, restart), which verify only
//! ```
//! The key id of such a key is its JWK thumbprint (RFC 7638).

use std::collections::HashMap;
use std::fs;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use aws_lc_rs::{digest, hmac};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD as B64};
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use serde::Deserialize;

use crate::clock::Timestamp;
use crate::config;
use crate::config::signing::KeyMaterial;
use crate::ids::{Environment, Topic};

use super::{Claims, Rejection, Verified};

/// Longer ones are not ours: claims and header of the longest names have under 2 KiB.
const TOKEN_MAX: usize = 8 << 10;
const ACTIVE: &str = "active.pem";

/// Signing and verification keys.
pub struct KeyRing {
    active: String,
    keys: HashMap<String, Key>,
}

struct Key {
    /// `base64url(header).`, the same for everything the key signs.
    prefix: String,
    secret: Material,
}

enum Material {
    EdDsa { pair: Box<Ed25519KeyPair>, public: UnparsedPublicKey<Vec<u8>> },
    Hs256(Box<hmac::Key>),
}

/// RFC 7515 section 4.1. Unknown members are refused: one may be `crit`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    alg: String,
    kid: String,
    typ: String,
}

impl KeyRing {
    /// From the configuration, or the key in `STATE_DIR/signing/` (made at the first start, mode 0600).
    ///
    /// # Errors
    /// What is wrong with which key or file, without its content.
    pub fn open(config: &config::Signing) -> Result<Self, String> {
        let mut keys = Self::configured(config)?;
        let configured = config.active.clone().or_else(|| config.keys.first().map(|key| key.id.clone()));
        if configured.is_none() {
            make(&config.dir)?;
        }
        let mut active = configured;
        for (name, pem) in files(&config.dir)? {
            let at = |cause| format!("{}: {cause}", config.dir.join(&name).display());
            let material = Material::ed25519(&pem).map_err(at)?;
            let id = material.thumbprint();
            if name == ACTIVE && active.is_none() {
                active = Some(id.clone());
            }
            // A key of the configuration keeps its own name; the same key under its thumbprint does no harm.
            keys.entry(id.clone()).or_insert_with(|| Key::new(&id, material));
        }
        let active = active.ok_or_else(|| format!("{} has no {ACTIVE}", config.dir.display()))?;
        if !keys.contains_key(&active) {
            return Err(format!("no signing key is called {active:?}"));
        }
        Ok(Self { active, keys })
    }

    /// The keys of the configuration alone; makes and opens nothing.
    ///
    /// # Errors
    /// What is wrong with which key, without its content.
    pub fn check(config: &config::Signing) -> Result<(), String> {
        Self::configured(config).map(drop)
    }

    fn configured(config: &config::Signing) -> Result<HashMap<String, Key>, String> {
        let mut keys = HashMap::new();
        for key in &config.keys {
            let material = match &key.material {
                KeyMaterial::EdDsa(pem) => Material::ed25519(pem.expose().as_bytes())
                    .map_err(|cause| format!("signing key {:?}: {cause}", key.id))?,
                KeyMaterial::Hs256(secret) => {
                    Material::Hs256(Box::new(hmac::Key::new(hmac::HMAC_SHA256, secret.expose().as_bytes())))
                }
            };
            keys.insert(key.id.clone(), Key::new(&key.id, material));
        }
        Ok(keys)
    }

    /// The `kid` of what is signed now.
    pub fn active(&self) -> &str {
        &self.active
    }

    /// The `kid`s of all keys that verify, sorted.
    pub fn ids(&self) -> Vec<&str> {
        let mut ids: Vec<_> = self.keys.keys().map(String::as_str).collect();
        ids.sort_unstable();
        ids
    }

    /// A compact JWS (RFC 7515) with `alg`, `kid`, `typ: "JWT"`.
    pub fn sign(&self, claims: &Claims) -> String {
        let key = &self.keys[&self.active];
        let json = serde_json::to_vec(claims).expect("claims are plain data");
        let mut token = String::with_capacity(key.prefix.len() + json.len() * 4 / 3 + 96);
        token.push_str(&key.prefix);
        B64.encode_string(&json, &mut token);
        match &key.secret {
            Material::EdDsa { pair, .. } => {
                let signature = pair.sign(token.as_bytes());
                token.push('.');
                B64.encode_string(signature.as_ref(), &mut token);
            }
            Material::Hs256(secret) => {
                let tag = hmac::sign(secret, token.as_bytes());
                token.push('.');
                B64.encode_string(tag.as_ref(), &mut token);
            }
        }
        token
    }

    /// Checks form, key, algorithm, signature, environment and topic; `now` decides `expired`.
    ///
    /// # Errors
    /// The first of these that does not hold. Claims are read only after the signature was checked.
    pub fn verify(
        &self,
        token: &[u8],
        environment: &Environment,
        found_on: Option<&Topic>,
        now: Timestamp,
    ) -> Result<Verified, Rejection> {
        let claims = self.authenticate(token)?;
        if &claims.environment != environment {
            return Err(Rejection::Environment(claims.environment));
        }
        if let Some(found) = found_on
            && &claims.topic != found
        {
            return Err(Rejection::Transplanted { signed: claims.topic, found: found.clone() });
        }
        let expired = claims.exp < now.as_secs();
        Ok(Verified { claims, expired })
    }

    fn authenticate(&self, token: &[u8]) -> Result<Claims, Rejection> {
        if token.len() > TOKEN_MAX {
            return Err(Rejection::Malformed("too long"));
        }
        let token = std::str::from_utf8(token).map_err(|_| Rejection::Malformed("not text"))?;
        let (signed, signature) = token.rsplit_once('.').ok_or(Rejection::Malformed("not three parts"))?;
        let (header, body) = signed.split_once('.').ok_or(Rejection::Malformed("not three parts"))?;
        if body.contains('.') {
            return Err(Rejection::Malformed("not three parts"));
        }
        let header = B64.decode(header).map_err(|_| Rejection::Malformed("the header is not base64url"))?;
        let header: Header =
            serde_json::from_slice(&header).map_err(|_| Rejection::Malformed("the header is not alg, kid and typ"))?;
        if header.typ != "JWT" {
            return Err(Rejection::Malformed("typ is not JWT"));
        }
        let key = self.keys.get(&header.kid).ok_or(Rejection::UnknownKey)?;
        if header.alg != key.secret.algorithm() {
            return Err(Rejection::Malformed("alg is not that of the key"));
        }
        let signature = B64.decode(signature).map_err(|_| Rejection::Malformed("the signature is not base64url"))?;
        let right = match &key.secret {
            Material::EdDsa { public, .. } => public.verify(signed.as_bytes(), &signature).is_ok(),
            Material::Hs256(secret) => hmac::verify(secret, signed.as_bytes(), &signature).is_ok(),
        };
        if !right {
            return Err(Rejection::Forged);
        }
        let body = B64.decode(body).map_err(|_| Rejection::Malformed("the claims are not base64url"))?;
        serde_json::from_slice(&body).map_err(|_| Rejection::Malformed("the claims cannot be read"))
    }

    /// Public keys as a JWK set (RFC 7517, RFC 8037), for external consumers (`GET /.well-known/jwks.json`). The active one is first.
    pub fn jwks(&self) -> serde_json::Value {
        let mut keys: Vec<_> = self.keys.iter().collect();
        keys.sort_by_key(|(id, _)| (**id != self.active, (*id).clone()));
        let keys: Vec<_> = keys
            .into_iter()
            .filter_map(|(id, key)| match &key.secret {
                Material::EdDsa { pair, .. } => Some(serde_json::json!({
                    "kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": id,
                    "x": B64.encode(pair.public_key().as_ref()),
                })),
                Material::Hs256(_) => None,
            })
            .collect();
        serde_json::json!({ "keys": keys })
    }
}

impl Key {
    fn new(id: &str, secret: Material) -> Self {
        let header = serde_json::json!({ "alg": secret.algorithm(), "kid": id, "typ": "JWT" });
        Self { prefix: format!("{}.", B64.encode(header.to_string())), secret }
    }
}

impl Material {
    fn ed25519(pem: &[u8]) -> Result<Self, &'static str> {
        let der =
            PrivatePkcs8KeyDer::from_pem_slice(pem).map_err(|_| "expected a PEM file with a PRIVATE KEY (PKCS#8)")?;
        // OpenSSL writes version 1, which has no public key to compare with.
        let pair = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der())
            .map_err(|_| "expected an Ed25519 key (`openssl genpkey -algorithm ed25519`)")?;
        let public = UnparsedPublicKey::new(&ED25519, pair.public_key().as_ref().to_vec());
        Ok(Self::EdDsa { pair: Box::new(pair), public })
    }

    fn algorithm(&self) -> &'static str {
        match self {
            Self::EdDsa { .. } => "EdDSA",
            Self::Hs256(_) => "HS256",
        }
    }

    /// RFC 7638 over the required members of an OKP key (RFC 8037 section 2), in lexical order.
    fn thumbprint(&self) -> String {
        let x = match self {
            Self::EdDsa { pair, .. } => B64.encode(pair.public_key().as_ref()),
            Self::Hs256(_) => String::new(),
        };
        let json = format!(r#"{{"crv":"Ed25519","kty":"OKP","x":"{x}"}}"#);
        B64.encode(digest::digest(&digest::SHA256, json.as_bytes()))
    }
}

/// Makes `active.pem` unless it is there.
fn make(dir: &Path) -> Result<(), String> {
    let path = dir.join(ACTIVE);
    let fail = |doing: &'static str| {
        let path = path.display().to_string();
        move |error: std::io::Error| format!("cannot {doing} {path}: {error}")
    };
    if path.exists() {
        return Ok(());
    }
    fs::create_dir_all(dir).map_err(fail("make the folder of"))?;
    let der = Ed25519KeyPair::generate()
        .and_then(|pair| pair.to_pkcs8v1())
        .map_err(|_| "cannot make a signing key: no randomness".to_owned())?;
    let mut pem = String::from("-----BEGIN PRIVATE KEY-----\n");
    for line in STANDARD.encode(der.as_ref()).as_bytes().chunks(64) {
        pem.push_str(std::str::from_utf8(line).expect("base64 is ASCII"));
        pem.push('\n');
    }
    pem.push_str("-----END PRIVATE KEY-----\n");
    // Written beside and linked: a crash leaves no half key, and of two processes one wins and both use its key.
    let part = dir.join(format!(".{ACTIVE}.{}", std::process::id()));
    let _ = fs::remove_file(&part);
    let mut file =
        fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part).map_err(fail("write"))?;
    file.write_all(pem.as_bytes()).and_then(|()| file.sync_all()).map_err(fail("write"))?;
    let linked = match fs::hard_link(&part, &path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => Err(fail("write")(error)),
        _ => Ok(()),
    };
    fs::remove_file(&part).map_err(fail("clean up beside"))?;
    linked?;
    for folder in [Some(dir), dir.parent()].into_iter().flatten() {
        fs::File::open(folder).and_then(|folder| folder.sync_all()).map_err(fail("sync the folder of"))?;
    }
    Ok(())
}

/// Every `*.pem` of the folder, sorted by name; none when there is no folder.
fn files(dir: &Path) -> Result<Vec<(String, Vec<u8>)>, String> {
    let fail = |error: std::io::Error| format!("cannot read the signing keys in {}: {error}", dir.display());
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(fail)?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(".pem") && !name.starts_with('.') {
            files.push((name, fs::read(entry.path()).map_err(fail)?));
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Secret;
    use crate::config::signing::SigningKey;
    use crate::ids::{BodyHash, ExecutionId, Tenant};
    use std::os::unix::fs::PermissionsExt;

    const NOW: Timestamp = Timestamp(1_795_478_400_000);

    fn environment() -> Environment {
        Environment::try_new("production").unwrap()
    }
    fn claims() -> Claims {
        Claims {
            execution_id: ExecutionId::new(),
            tenant_id: Tenant::try_new("acme").unwrap(),
            environment: environment(),
            topic: Topic::try_new("dealscale.workflow.long").unwrap(),
            payload_sha256: BodyHash::of(b"{}"),
            iat: NOW.as_secs(),
            exp: NOW.as_secs() + 60,
        }
    }
    fn config(dir: &Path, active: Option<&str>, keys: &[(&str, KeyMaterial)]) -> config::Signing {
        config::Signing {
            active: active.map(str::to_owned),
            keys: keys.iter().map(|(id, m)| SigningKey { id: (*id).into(), material: m.clone() }).collect(),
            dir: dir.join("signing"),
        }
    }
    fn hs256(text: &str) -> KeyMaterial {
        KeyMaterial::Hs256(Secret::new(text.repeat(8)))
    }
    fn verify(ring: &KeyRing, token: &str) -> Result<Verified, Rejection> {
        ring.verify(token.as_bytes(), &environment(), Some(&claims().topic), NOW)
    }
    fn with_header(header: &str, token: &str) -> String {
        format!("{}.{}", B64.encode(header), token.split_once('.').unwrap().1)
    }

    #[test]
    fn invariant_3_the_first_start_makes_a_key_that_stays() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), None, &[]);
        let (one, two) = (KeyRing::open(&config).unwrap(), KeyRing::open(&config).unwrap());
        let claims = claims();
        assert_eq!(verify(&two, &one.sign(&claims)), Ok(Verified { claims, expired: false }));
        let file = config.dir.join(ACTIVE);
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(&config.dir).unwrap().count(), 1);
    }

    #[test]
    fn invariant_4_former_keys_verify_until_they_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path(), None, &[]);
        let token = KeyRing::open(&config).unwrap().sign(&claims());
        fs::rename(config.dir.join(ACTIVE), config.dir.join("2026.pem")).unwrap();
        let ring = KeyRing::open(&config).unwrap();
        assert!(verify(&ring, &token).is_ok());
        assert_eq!(ring.jwks()["keys"].as_array().unwrap().len(), 2);
        assert_eq!(ring.jwks()["keys"][0]["kid"], ring.active());
        fs::remove_file(config.dir.join("2026.pem")).unwrap();
        assert_eq!(verify(&KeyRing::open(&config).unwrap(), &token), Err(Rejection::UnknownKey));
    }

    #[test]
    fn invariant_4_configured_keys_rotate_between_algorithms() {
        let dir = tempfile::tempdir().unwrap();
        let made = KeyRing::open(&config(dir.path(), None, &[])).unwrap();
        let pem = fs::read_to_string(dir.path().join("signing").join(ACTIVE)).unwrap();
        let keys = [("old", hs256("old.")), ("new", KeyMaterial::EdDsa(Secret::new(pem)))];
        let old = KeyRing::open(&config(dir.path(), Some("old"), &keys)).unwrap();
        let new = KeyRing::open(&config(dir.path(), Some("new"), &keys)).unwrap();
        for signer in [&made, &old, &new] {
            for reader in [&old, &new] {
                assert!(verify(reader, &signer.sign(&claims())).is_ok());
            }
        }
        // Nothing of a secret is published.
        assert!(old.jwks()["keys"].as_array().unwrap().iter().all(|k| k["kid"] != "old"));
    }

    #[test]
    fn invariant_1_the_token_does_not_choose_its_algorithm() {
        let dir = tempfile::tempdir().unwrap();
        let ring = KeyRing::open(&config(dir.path(), None, &[])).unwrap();
        let token = ring.sign(&claims());
        let kid = ring.active();
        let none = with_header(&format!(r#"{{"alg":"none","kid":"{kid}","typ":"JWT"}}"#), &token);
        assert!(matches!(verify(&ring, &none), Err(Rejection::Malformed(_))));
        let unsigned = none.rsplit_once('.').unwrap().0.to_owned() + ".";
        assert!(matches!(verify(&ring, &unsigned), Err(Rejection::Malformed(_))));
        // HMAC with the public key, which everybody can read.
        let public = B64.decode(ring.jwks()["keys"][0]["x"].as_str().unwrap()).unwrap();
        let confused = with_header(&format!(r#"{{"alg":"HS256","kid":"{kid}","typ":"JWT"}}"#), &token);
        let signed = confused.rsplit_once('.').unwrap().0;
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &public), signed.as_bytes());
        let confused = format!("{signed}.{}", B64.encode(tag.as_ref()));
        assert_eq!(verify(&ring, &confused), Err(Rejection::Malformed("alg is not that of the key")));
    }

    #[test]
    fn invariant_2_only_our_own_header_is_understood() {
        let dir = tempfile::tempdir().unwrap();
        let ring = KeyRing::open(&config(dir.path(), None, &[])).unwrap();
        let token = ring.sign(&claims());
        let kid = ring.active();
        for header in [
            r#"{"alg":"EdDSA","typ":"JWT"}"#.to_owned(),
            format!(r#"{{"alg":"EdDSA","kid":"{kid}"}}"#),
            format!(r#"{{"alg":"EdDSA","kid":"{kid}","typ":"at+jwt"}}"#),
            format!(r#"{{"alg":"EdDSA","kid":"{kid}","typ":"JWT","crit":["exp"]}}"#),
            format!(r#"{{"alg":"EdDSA","kid":"{kid}","typ":"JWT","jwk":{{}}}}"#),
        ] {
            assert!(matches!(verify(&ring, &with_header(&header, &token)), Err(Rejection::Malformed(_))), "{header}");
        }
        for junk in ["", ".", "..", "a.b", "a.b.c", "a.b.c.d", &"x".repeat(TOKEN_MAX + 1), "{}"] {
            assert!(matches!(verify(&ring, junk), Err(Rejection::Malformed(_))), "{junk}");
        }
        assert!(matches!(ring.verify(&[0xff, 0xfe], &environment(), None, NOW), Err(Rejection::Malformed("not text"))));
    }

    #[test]
    fn what_was_altered_or_signed_by_others_is_refused() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        for material in [None, Some(hs256("key."))] {
            let keys: Vec<_> = material.iter().map(|m| ("k", m.clone())).collect();
            let ring = KeyRing::open(&config(dir.path(), None, &keys)).unwrap();
            let good = claims();
            let token = ring.sign(&good);
            // Every single character counts.
            let accepted: Vec<_> = (0..token.len())
                .filter(|at| {
                    let mut bytes = token.clone().into_bytes();
                    bytes[*at] = if bytes[*at] == b'A' { b'B' } else { b'A' };
                    ring.verify(&bytes, &environment(), None, NOW).is_ok()
                })
                .collect();
            assert_eq!(accepted, [] as [usize; 0]);
            let mine = Claims { tenant_id: Tenant::try_new("other").unwrap(), ..good };
            let parts: Vec<_> = token.split('.').collect();
            let altered = [parts[0], &B64.encode(serde_json::to_vec(&mine).unwrap()), parts[2]].join(".");
            assert_eq!(verify(&ring, &altered), Err(Rejection::Forged));
        }
        let ring = KeyRing::open(&config(dir.path(), None, &[])).unwrap();
        let stranger = KeyRing::open(&config(other.path(), None, &[])).unwrap();
        assert_eq!(verify(&ring, &stranger.sign(&claims())), Err(Rejection::UnknownKey));
    }

    #[test]
    fn a_reference_counts_where_it_was_signed_for() {
        let dir = tempfile::tempdir().unwrap();
        let ring = KeyRing::open(&config(dir.path(), None, &[])).unwrap();
        let claims = claims();
        let token = ring.sign(&claims);
        let elsewhere = Topic::try_new("dealscale.workflow.short").unwrap();
        assert_eq!(
            ring.verify(token.as_bytes(), &environment(), Some(&elsewhere), NOW),
            Err(Rejection::Transplanted { signed: claims.topic.clone(), found: elsewhere })
        );
        let staging = Environment::try_new("staging").unwrap();
        assert_eq!(
            ring.verify(token.as_bytes(), &staging, Some(&claims.topic), NOW),
            Err(Rejection::Environment(environment()))
        );
        // Expired: authentic all the same.
        let later = Timestamp(NOW.0 + 61_000);
        let verified = ring.verify(token.as_bytes(), &environment(), None, later).unwrap();
        assert_eq!(verified, Verified { claims, expired: true });
    }

    #[test]
    fn a_broken_key_is_named_but_not_shown() {
        let dir = tempfile::tempdir().unwrap();
        let bad = config(dir.path(), None, &[("k", KeyMaterial::EdDsa(Secret::new("hunter2")))]);
        let error = KeyRing::open(&bad).err().unwrap();
        assert!(error.contains("\"k\"") && !error.contains("hunter2"), "{error}");
        let empty = config(dir.path(), None, &[]);
        fs::create_dir_all(&empty.dir).unwrap();
        fs::write(empty.dir.join(ACTIVE), "hunter2").unwrap();
        let error = KeyRing::open(&empty).err().unwrap();
        assert!(error.contains(ACTIVE) && !error.contains("hunter2"), "{error}");
    }
}
