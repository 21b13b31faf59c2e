//! `[signing]`: the keys that sign references on their way through Pulsar, and webhooks.

use std::path::{Path, PathBuf};

use super::{Secret, Section};

/// Where the key ring comes from.
#[derive(Clone, Debug)]
pub struct Signing {
    /// The key that signs new references. Without `[[signing.keys]]` an Ed25519 key is made at the first start and kept
    /// in `STATE_DIR/signing/`.
    pub active: Option<String>,
    pub keys: Vec<SigningKey>,
    pub dir: PathBuf,
}

#[derive(Clone, Debug)]
pub struct SigningKey {
    /// `kid` in the header of what it signs.
    pub id: String,
    pub material: KeyMaterial,
}

#[derive(Clone, Debug)]
pub enum KeyMaterial {
    /// PKCS#8 PEM of an Ed25519 private key.
    EdDsa(Secret),
    /// At least 32 bytes of secret text.
    Hs256(Secret),
}

impl Signing {
    pub(super) fn check(s: &mut Section<'_>, state_dir: &Path) -> Self {
        let active = s.parse_opt::<String>("active");
        let keys: Vec<_> = s.tables("keys", |_, s| {
            let id = s.parse_opt::<String>("id");
            let ed = s.choice("algorithm", true, &[("EdDSA", true), ("HS256", false)]);
            let key = s.secret_text("key");
            let (Some(id), Some(key)) = (id, key) else {
                s.problem("id", "a signing key needs id, algorithm and key (or key_file)");
                return None;
            };
            if !ed && key.expose().len() < 32 {
                s.problem("key", "an HS256 key needs at least 32 bytes");
                return None;
            }
            Some(SigningKey { id, material: if ed { KeyMaterial::EdDsa(key) } else { KeyMaterial::Hs256(key) } })
        });
        let keys: Vec<_> = keys.into_iter().flatten().collect();
        match &active {
            Some(id) if !keys.iter().any(|k| &k.id == id) => s.problem("active", "names no key of [[signing.keys]]"),
            None if keys.len() > 1 => s.problem("active", "say which of the keys signs"),
            _ => {}
        }
        for (n, key) in keys.iter().enumerate() {
            if keys[..n].iter().any(|k| k.id == key.id) {
                s.problem(&format!("keys[{n}].id"), "is used twice");
            }
        }
        Self { active, keys, dir: state_dir.join("signing") }
    }
}
