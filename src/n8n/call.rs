//! The HTTP client: pooled HTTP/1.1, one call, one classified result.

use std::error::Error as _;

use bytes::{Bytes, BytesMut};

use super::{Answer, Call, CallError};
use crate::config;
use crate::units::Bytes as Size;

/// What is kept of an answer: enough for n8n's execution id and for an error text, not enough to fill memory.
const ANSWER_MAX: usize = Size::kib(64).as_usize();

pub(super) fn client(config: &config::N8n) -> Result<reqwest::Client, String> {
    reqwest::Client::builder()
        .http1_only()
        .connect_timeout(config.connect_timeout.0)
        .pool_idle_timeout(config.idle_timeout.0)
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        // A proxy of the machine's environment is for the way out; n8n is ours.
        .no_proxy()
        .user_agent(concat!("dealscale/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| format!("cannot make the HTTP client: {}", cause(&error)))
}

pub(super) async fn call(client: &reqwest::Client, call: Call) -> Result<Answer, CallError> {
    let mut response = send(client, call).await?;
    let status = response.status();
    let headers = std::mem::take(response.headers_mut());
    let mut body = BytesMut::new();
    let mut first = Bytes::new();
    while let Some(chunk) = response.chunk().await.map_err(classify)? {
        let room = ANSWER_MAX - first.len() - body.len();
        let chunk = if chunk.len() > room { chunk.slice(..room) } else { chunk };
        // Nearly every answer is one chunk: no copy for it.
        if first.is_empty() && body.is_empty() {
            first = chunk;
        } else {
            body.extend_from_slice(&std::mem::take(&mut first));
            body.extend_from_slice(&chunk);
        }
        if first.len() + body.len() >= ANSWER_MAX {
            break;
        }
    }
    let body = if body.is_empty() { first } else { body.freeze() };
    Ok(Answer { status, headers, body })
}

pub(super) async fn send(client: &reqwest::Client, call: Call) -> Result<reqwest::Response, CallError> {
    client
        .request(call.method, call.url)
        .headers(call.headers)
        .body(call.body)
        .timeout(call.timeout)
        .send()
        .await
        .map_err(classify)
}

fn classify(error: reqwest::Error) -> CallError {
    if error.is_connect() || error.is_builder() {
        CallError::Connect(cause(&error))
    } else if error.is_timeout() {
        CallError::Timeout
    } else {
        CallError::Reset(cause(&error))
    }
}

/// The innermost cause: the outer ones name the URL, whose query may be private.
pub(super) fn cause(error: &reqwest::Error) -> String {
    let mut inner: &dyn std::error::Error = match error.source() {
        Some(source) => source,
        None if error.is_timeout() => return "no answer in time".to_owned(),
        None => return "the request failed".to_owned(),
    };
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::super::{N8n, tests::config};
    use super::*;

    /// Serves one connection with `answer` (bytes, then close), and returns what was asked.
    async fn once(answer: Vec<u8>, linger: Duration) -> (N8n, tokio::task::JoinHandle<Vec<u8>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let n8n = N8n::new(&config(&format!("http://{}", listener.local_addr().unwrap()))).unwrap();
        #[allow(clippy::disallowed_methods)]
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = vec![0; 65_536];
            let n = stream.read(&mut asked).await.unwrap();
            asked.truncate(n);
            stream.write_all(&answer).await.unwrap();
            tokio::time::sleep(linger).await;
            asked
        });
        (n8n, server)
    }

    fn post(n8n: &N8n, timeout: Duration) -> Call {
        Call {
            method: http::Method::POST,
            url: n8n.webhook_url("/webhook/x", None, "t").unwrap(),
            headers: http::HeaderMap::new(),
            body: Bytes::from_static(b"{}"),
            timeout,
        }
    }

    const LONG: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn a_redirect_is_an_answer() {
        let (n8n, _server) =
            once(b"HTTP/1.1 302 Found\r\nlocation: /elsewhere\r\ncontent-length: 0\r\n\r\n".to_vec(), LONG).await;
        assert_eq!(n8n.call(post(&n8n, LONG)).await.unwrap().status, 302);
    }

    #[tokio::test]
    async fn a_long_answer_is_cut() {
        let mut answer = b"HTTP/1.1 200 OK\r\ncontent-length: 200000\r\n\r\n".to_vec();
        answer.resize(answer.len() + 200_000, b'x');
        let (n8n, _server) = once(answer, LONG).await;
        assert_eq!(n8n.call(post(&n8n, LONG)).await.unwrap().body.len(), ANSWER_MAX);
    }

    #[tokio::test]
    async fn what_n8n_may_have_seen_is_told_apart() {
        let (n8n, _server) = once(Vec::new(), LONG).await;
        assert_eq!(n8n.call(post(&n8n, Duration::from_millis(50))).await.unwrap_err(), CallError::Timeout);
        let (n8n, _server) = once(Vec::new(), Duration::ZERO).await;
        assert!(matches!(n8n.call(post(&n8n, LONG)).await.unwrap_err(), CallError::Reset(_)));
        let n8n = N8n::new(&config("http://127.0.0.1:1")).unwrap();
        assert!(matches!(n8n.call(post(&n8n, LONG)).await.unwrap_err(), CallError::Connect(_)));
    }
}
