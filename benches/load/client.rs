//! One keep-alive HTTP/1.1 connection: sends prepared requests, reads just enough of the answer.

use std::io::{Error, ErrorKind, Result};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

pub struct Connection {
    authority: String,
    stream: Option<TcpStream>,
    buffer: Vec<u8>,
}

impl Connection {
    pub fn new(authority: &str) -> Self {
        Self { authority: authority.to_owned(), stream: None, buffer: Vec::with_capacity(4_096) }
    }

    /// Sends `request` and returns the answer's status; the body is [`Self::body`]. After an error the next call connects again.
    pub async fn call(&mut self, request: &[u8]) -> Result<u16> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => {
                let stream = TcpStream::connect(&self.authority).await?;
                stream.set_nodelay(true)?;
                stream
            }
        };
        stream.write_all(request).await?;
        self.buffer.clear();
        let head = loop {
            if stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            if let Some(at) = self.buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                break at;
            }
        };
        let text = std::str::from_utf8(&self.buffer[..head]).map_err(|_| ErrorKind::InvalidData)?;
        let (status, length, close) = parse(text)?;
        while self.buffer.len() < head + 4 + length {
            if stream.read_buf(&mut self.buffer).await? == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
        }
        self.buffer.drain(..head + 4);
        if !close {
            self.stream = Some(stream);
        }
        Ok(status)
    }

    /// The body of the last answer.
    pub fn body(&self) -> &[u8] {
        &self.buffer
    }
}

/// Status, length of the body, whether the connection ends.
fn parse(head: &str) -> Result<(u16, usize, bool)> {
    let bad = |what: &str| Error::new(ErrorKind::InvalidData, what.to_owned());
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|l| l.split(' ').nth(1)).and_then(|s| s.parse().ok());
    let (mut length, mut close) = (None, false);
    for line in lines {
        let (name, value) = line.split_once(':').ok_or_else(|| bad("a header without a colon"))?;
        let value = value.trim();
        if name.eq_ignore_ascii_case("content-length") {
            length = value.parse().ok();
        } else if name.eq_ignore_ascii_case("connection") {
            close = value.eq_ignore_ascii_case("close");
        }
    }
    Ok((status.ok_or_else(|| bad("no status"))?, length.ok_or_else(|| bad("no content-length"))?, close))
}
