//! A route's `webhook_auth`, in the three forms that n8n's Webhook node verifies (n8n 2.41, `Webhook/utils.ts`).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};

use crate::clock::Timestamp;
use crate::config::routes::WebhookAuth;

/// Seconds that a JWT is valid for: longer than any clock skew that n8n's default of none would forgive is not needed,
/// since each call gets a fresh one.
const JWT_SECONDS: i64 = 60;

/// Adds the route's authentication to the headers of a call (`webhook_auth`).
pub fn authorize(headers: &mut HeaderMap, auth: &WebhookAuth, now: Timestamp) {
    match auth {
        WebhookAuth::None => {}
        WebhookAuth::Header { name, value } => {
            let name = HeaderName::try_from(name.as_str()).expect("checked by the configuration");
            headers.insert(name, secret(value.expose()));
        }
        WebhookAuth::Basic { user, password } => {
            let pair = STANDARD.encode(format!("{user}:{}", password.expose()));
            headers.insert(AUTHORIZATION, secret(&format!("Basic {pair}")));
        }
        WebhookAuth::Jwt { secret: key } => {
            // A little in the past, so that a clock of n8n's that is behind does not find the token from the future.
            let claims = serde_json::json!({
                "iss": "dealscale",
                "iat": now.as_secs() - 5,
                "exp": now.as_secs() + JWT_SECONDS,
            });
            let key = jsonwebtoken::EncodingKey::from_secret(key.expose().as_bytes());
            let token = jsonwebtoken::encode(&jsonwebtoken::Header::default(), &claims, &key)
                .expect("HS256 signs any JSON with any key");
            headers.insert(AUTHORIZATION, secret(&format!("Bearer {token}")));
        }
    }
}

/// Marked sensitive, so that no debug output shows it.
fn secret(text: &str) -> HeaderValue {
    let mut value = HeaderValue::try_from(text).expect("checked by the configuration, or base64");
    value.set_sensitive(true);
    value
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Secret;

    const NOW: Timestamp = Timestamp(1_795_478_400_123);

    fn headers(auth: &WebhookAuth) -> HeaderMap {
        let mut headers = HeaderMap::new();
        authorize(&mut headers, auth, NOW);
        headers
    }

    #[test]
    fn header_and_basic_are_what_n8n_compares() {
        let made = headers(&WebhookAuth::Header { name: "X-Key".into(), value: Secret::new("s3cret") });
        assert_eq!(made["x-key"], "s3cret");
        assert!(made["x-key"].is_sensitive());
        let made = headers(&WebhookAuth::Basic { user: "Aladdin".into(), password: Secret::new("open sesame") });
        // The example of RFC 7617 section 2.
        assert_eq!(made[AUTHORIZATION], "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        assert!(headers(&WebhookAuth::None).is_empty());
    }

    #[test]
    fn a_jwt_is_signed_with_the_passphrase_and_short_lived() {
        let made = headers(&WebhookAuth::Jwt { secret: Secret::new("passphrase") });
        let token = made[AUTHORIZATION].to_str().unwrap().strip_prefix("Bearer ").unwrap();
        let mut validation = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::HS256);
        validation.validate_exp = false;
        let decode = |key: &str| {
            jsonwebtoken::decode::<serde_json::Value>(
                token,
                &jsonwebtoken::DecodingKey::from_secret(key.as_bytes()),
                &validation,
            )
        };
        let claims = decode("passphrase").unwrap().claims;
        assert_eq!(claims["exp"].as_i64().unwrap() - NOW.as_secs(), 60);
        assert!(decode("another").is_err());
    }
}
