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
    // The status is the answer: a body that breaks off or does not end in time takes nothing back of it. What has come of it
    // is kept.
    while let Ok(Some(chunk)) = response.chunk().await {
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
    async fn a_signed_call_does_not_follow_to_another_server() {
        let elsewhere = TcpListener::bind("127.0.0.1:0").await.unwrap();
        for status in ["301 Moved", "302 Found", "303 See Other", "307 Temporary Redirect", "308 Permanent Redirect"] {
            let location = elsewhere.local_addr().unwrap();
            let answer =
                format!("HTTP/1.1 {status}\r\nlocation: http://{location}/\r\ncontent-length: 0\r\n\r\n").into_bytes();
            let (n8n, _server) = once(answer, LONG).await;
            assert!(n8n.call(post(&n8n, LONG)).await.unwrap().status.is_redirection());
        }
        let nobody = tokio::time::timeout(Duration::from_millis(50), elsewhere.accept()).await;
        assert!(nobody.is_err(), "the call went on to where the redirect pointed");
    }

    /// What strange servers answer, what is made of it, and that it ends in time.
    #[tokio::test]
    async fn strange_answers_are_answers_or_broken_connections() {
        let head = |status: &str, more: &str| format!("HTTP/1.1 {status}\r\n{more}\r\n").into_bytes();
        let with = |head: Vec<u8>, body: &[u8]| [head, body.to_vec()].concat();
        let many = |count: usize| (0..count).map(|n| format!("x-{n}: 1\r\n")).collect::<String>();
        let cases: Vec<(&str, Vec<u8>, Option<u16>)> = vec![
            ("204", head("204 No Content", ""), Some(204)),
            ("informational", with(head("100 Continue", ""), &head("204 No Content", "")), Some(204)),
            ("early hints", with(head("103 Early Hints", "link: </x>\r\n"), &head("204 No Content", "")), Some(204)),
            // The status is known: it counts, whatever becomes of the body.
            ("ends in mid-body", with(head("200 OK", "content-length: 100\r\n"), b"{\"a\":"), Some(200)),
            ("gone, in mid-body", with(head("410 Gone", "content-length: 100\r\n"), b"x"), Some(410)),
            ("a chunk that is none", with(head("200 OK", "transfer-encoding: chunked\r\n"), b"zz\r\n"), Some(200)),
            ("no UTF-8", with(head("500 No", "x: \u{fffd}\r\ncontent-length: 2\r\n"), b"\xff\xfe"), Some(500)),
            ("unknown status", head("799 What", "content-length: 0\r\n"), Some(799)),
            ("a header of 1 MiB", head("200 OK", &format!("x: {}\r\n", "y".repeat(1 << 20))), None),
            ("10,000 headers", head("200 OK", &many(10_000)), None),
            ("no HTTP", b"SSH-2.0-OpenSSH_9.2\r\n".to_vec(), None),
            ("nothing", Vec::new(), None),
        ];
        for (name, answer, expected) in cases {
            let (n8n, _server) = once(answer, Duration::ZERO).await;
            let outcome = n8n.call(post(&n8n, LONG)).await;
            match (&outcome, expected) {
                (Ok(answer), Some(status)) => assert_eq!(answer.status.as_u16(), status, "{name}"),
                (Err(CallError::Reset(_)), None) => {}
                _ => panic!("{name}: {outcome:?}"),
            }
        }
    }

    #[tokio::test]
    async fn a_body_that_never_ends_takes_nothing_back_of_the_status() {
        let answer = b"HTTP/1.1 429 Slow\r\nretry-after: 7\r\ncontent-length: 100\r\n\r\nx".to_vec();
        let (n8n, _server) = once(answer, LONG).await;
        let answer = n8n.call(post(&n8n, Duration::from_millis(200))).await.unwrap();
        assert_eq!((answer.status.as_u16(), &answer.body[..]), (429, &b"x"[..]));
        assert_eq!(answer.headers["retry-after"], "7");
    }

    /// A kept connection that the server closes as the next call comes is the moment in which a client that sends again by
    /// itself runs a workflow twice.
    #[tokio::test]
    async fn a_call_on_a_kept_connection_is_sent_once() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let n8n = N8n::new(&config(&format!("http://{}", listener.local_addr().unwrap()))).unwrap();
        #[allow(clippy::disallowed_methods)]
        let server = tokio::spawn(async move {
            let mut requests = 0;
            loop {
                let Ok((mut stream, _)) = listener.accept().await else { return requests };
                let mut on_this = 0;
                let mut asked = vec![0; 65_536];
                // The second request on a connection is read and the connection closed.
                while on_this < 2 && stream.read(&mut asked).await.unwrap_or(0) > 0 {
                    (on_this, requests) = (on_this + 1, requests + 1);
                    if on_this == 1 {
                        stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
                    }
                }
                if requests >= 3 {
                    return requests;
                }
            }
        });
        assert_eq!(n8n.call(post(&n8n, LONG)).await.unwrap().status, 204);
        assert!(matches!(n8n.call(post(&n8n, LONG)).await.unwrap_err(), CallError::Reset(_)));
        // The third goes over a new connection; nobody sent the second one again.
        assert_eq!(n8n.call(post(&n8n, LONG)).await.unwrap().status, 204);
        drop(n8n);
        assert_eq!(server.await.unwrap(), 3);
    }

    #[tokio::test]
    async fn names_and_certificates_that_do_not_work_mean_that_nothing_was_seen() {
        let n8n = N8n::new(&config("http://n8n.invalid")).unwrap();
        assert!(matches!(n8n.call(post(&n8n, LONG)).await.unwrap_err(), CallError::Connect(_)));
        let (plain, _server) = once(b"HTTP/1.1 200 OK\r\n\r\n".to_vec(), LONG).await;
        let n8n = N8n::new(&config(&plain.base().as_str().replace("http://", "https://"))).unwrap();
        assert!(matches!(n8n.call(post(&n8n, LONG)).await.unwrap_err(), CallError::Connect(_)));
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
