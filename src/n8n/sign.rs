//! Standard Webhooks 1.0.0: the headers by which a receiver knows a call again and knows that it is ours.

use aws_lc_rs::hmac;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{HeaderMap, HeaderName, HeaderValue};

use crate::clock::Timestamp;
use crate::config::Delivery;
use crate::config::delivery::webhook_key;

const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");

/// Signs with every current secret; without one calls have an id and a time only.
#[derive(Clone, Debug)]
pub struct Signer {
    keys: Vec<hmac::Key>,
}

impl Signer {
    /// # Errors
    /// A secret that the configuration would have refused.
    pub fn new(config: &Delivery) -> Result<Self, String> {
        let secrets =
            [("webhook_secret", &config.webhook_secret), ("webhook_secret_previous", &config.webhook_secret_previous)];
        let key = |(name, secret)| {
            let bytes = webhook_key(secret).ok_or_else(|| format!("delivery.{name} is no Standard-Webhooks secret"))?;
            Ok(hmac::Key::new(hmac::HMAC_SHA256, &bytes))
        };
        let given = secrets.into_iter().filter_map(|(name, secret)| Some((name, secret.as_ref()?)));
        Ok(Self { keys: given.map(key).collect::<Result<_, String>>()? })
    }

    /// Adds `webhook-id`, `webhook-timestamp` and, with a secret, `webhook-signature` to the headers of a call.
    pub fn sign(&self, headers: &mut HeaderMap, id: &str, now: Timestamp, body: &[u8]) {
        let visible = |text: &str| HeaderValue::try_from(text).expect("ids and numbers are visible ASCII");
        let timestamp = now.as_secs().to_string();
        if let Some(signature) = self.signature(id, &timestamp, body) {
            headers.insert(WEBHOOK_SIGNATURE, signature);
        }
        headers.insert(WEBHOOK_ID, visible(id));
        headers.insert(WEBHOOK_TIMESTAMP, visible(&timestamp));
    }

    /// `v1,BASE64` per key, separated by spaces.
    fn signature(&self, id: &str, timestamp: &str, body: &[u8]) -> Option<HeaderValue> {
        let mut signatures = String::new();
        for key in &self.keys {
            let mut context = hmac::Context::with_key(key);
            for part in [id.as_bytes(), b".", timestamp.as_bytes(), b".", body] {
                context.update(part);
            }
            let separator = if signatures.is_empty() { "" } else { " " };
            signatures.push_str(separator);
            signatures.push_str("v1,");
            STANDARD.encode_string(context.sign().as_ref(), &mut signatures);
        }
        (!signatures.is_empty()).then(|| HeaderValue::try_from(signatures).expect("base64 is visible ASCII"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn signer(secrets: &str) -> Signer {
        let text = format!("state_dir = \"/nowhere\"\n[environments.test.delivery]\n{secrets}");
        let config = crate::config::parse(&text).unwrap();
        Signer::new(&config.environments.into_values().next().unwrap().delivery).unwrap()
    }

    /// The vector of the Standard Webhooks libraries (id, time, secret and body as in their tests).
    #[test]
    fn signatures_are_those_of_standard_webhooks() {
        let signer = signer(
            "webhook_secret = \"whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\"\n\
             webhook_secret_previous = \"whsec_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA\"\n",
        );
        let mut headers = HeaderMap::new();
        let (id, at) = ("msg_p5jXN8AQM9LWM0D4loKWxJek", Timestamp(1_614_265_330_999));
        signer.sign(&mut headers, id, at, b"{\"test\": 2432232314}");
        assert_eq!(
            (&headers["webhook-id"], &headers["webhook-timestamp"]),
            (&id.parse().unwrap(), &"1614265330".parse().unwrap())
        );
        let mut signatures = headers["webhook-signature"].to_str().unwrap().split(' ');
        assert_eq!(signatures.next(), Some("v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="));
        assert!(signatures.next().unwrap().starts_with("v1,"));
        assert_eq!(signatures.next(), None);
    }

    #[test]
    fn without_a_secret_a_call_has_its_id_and_time() {
        let mut headers = HeaderMap::new();
        signer("").sign(&mut headers, "x", Timestamp(1_000), b"{}");
        assert_eq!((headers.len(), &headers["webhook-timestamp"]), (2, &"1".parse().unwrap()));
    }
}
