//! The floor under every durable accept: the smallest hyper server that appends each body to one file with a shared
//! `fdatasync` and answers 202. No authentication, no parsing, no idempotency, nothing to read it back.
//!
//! `bench-floor --listen ADDRESS --file FILE`

#![allow(clippy::print_stdout, reason = "a program of the bench: its output is its result")]

use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;

use bytes::Bytes;
use clap::Parser;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;

#[derive(Parser)]
struct Arguments {
    #[arg(long)]
    listen: SocketAddr,
    #[arg(long)]
    file: PathBuf,
}

/// One body on its way to the disk.
struct Append {
    body: Bytes,
    on_disk: oneshot::Sender<()>,
}

/// As many appends as may share one sync: above the largest number of connections that is measured.
const APPENDS_MAX: usize = 4_096;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // What `cargo bench` passes: there is nothing to measure without the script.
    if std::env::args().any(|a| a == "--bench") {
        println!("see benches/run.sh");
        return Ok(());
    }
    let arguments = Arguments::parse();
    let file = OpenOptions::new().create(true).append(true).open(&arguments.file)?;
    let (appends, queue) = mpsc::channel(APPENDS_MAX);
    std::thread::spawn(move || write(file, queue));
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(serve(arguments.listen, appends))?;
    Ok(())
}

/// Takes everything that has queued, writes it with one call, syncs once, answers all.
fn write(mut file: File, mut queue: mpsc::Receiver<Append>) {
    let (mut waiting, mut block) = (Vec::new(), Vec::new());
    while queue.blocking_recv_many(&mut waiting, APPENDS_MAX) > 0 {
        block.clear();
        for append in &waiting {
            block.extend_from_slice(&append.body);
            block.push(b'\n');
        }
        // A floor that cannot write has nothing to say.
        file.write_all(&block).and_then(|()| file.sync_data()).expect("the disk takes what the floor writes");
        for append in waiting.drain(..) {
            let _ = append.on_disk.send(());
        }
    }
}

async fn serve(address: SocketAddr, appends: mpsc::Sender<Append>) -> std::io::Result<()> {
    let listener = TcpListener::bind(address).await?;
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let appends = appends.clone();
        let service = hyper::service::service_fn(move |request| answer(request, appends.clone()));
        connections.spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
        while connections.try_join_next().is_some() {}
    }
}

async fn answer(
    request: Request<Incoming>,
    appends: mpsc::Sender<Append>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let status = match request.into_body().collect().await {
        Err(_) => StatusCode::BAD_REQUEST,
        Ok(body) => {
            let (on_disk, done) = oneshot::channel();
            let sent = appends.send(Append { body: body.to_bytes(), on_disk }).await;
            if sent.is_ok() && done.await.is_ok() { StatusCode::ACCEPTED } else { StatusCode::SERVICE_UNAVAILABLE }
        }
    };
    let mut response = Response::new(Full::new(Bytes::from_static(b"{}")));
    *response.status_mut() = status;
    Ok(response)
}
