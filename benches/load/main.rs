//! The load generator of the bench: HTTP/1.1 keep-alive connections that publish 1 KiB events, every second one with an
//! `Idempotency-Key`, and a receiver that stands in for n8n.
//!
//! ```text
//! bench-load publish   closed loop, or with --rate at a fixed rate; bounded by --count or --seconds
//! bench-load deliver   the same by --count, then waits until the receiver has seen every accepted event
//! bench-load receive   only the receiver; GET /count tells what it has seen
//! ```
//!
//! The client is written by hand on purpose: on a small machine it shares the cores with what it measures, and every
//! microsecond that it takes flatters nobody. Results are one line of JSON on standard output.

#![allow(clippy::print_stdout, reason = "a program of the bench: its output is its result")]

mod client;
mod event;
mod publish;
mod receive;
mod summary;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use clap::{Args, Parser};

#[derive(Parser)]
enum Arguments {
    /// Publishes and measures the answers.
    Publish(Publish),
    /// Publishes, receives, and measures the way from the first publish to the last distinct delivery.
    Deliver {
        #[command(flatten)]
        publish: Publish,
        /// Where the receiver listens.
        #[arg(long)]
        receiver: SocketAddr,
        /// How long the last deliveries may take after the last publish.
        #[arg(long, default_value_t = 120)]
        drain_seconds: u64,
    },
    /// Receives until it is ended.
    Receive {
        #[arg(long)]
        listen: SocketAddr,
    },
}

#[derive(Args, Clone)]
struct Publish {
    /// `http://ADDRESS:PORT/path`
    #[arg(long)]
    url: String,
    #[arg(long)]
    token: Option<String>,
    #[arg(long, default_value_t = 64)]
    connections: usize,
    #[arg(long)]
    count: Option<u64>,
    #[arg(long)]
    seconds: Option<u64>,
    /// Seconds at the beginning that are not measured.
    #[arg(long, default_value_t = 0)]
    warmup: u64,
    /// Requests per second over all connections, on a fixed timetable. Without it each connection sends as soon as it is answered.
    #[arg(long)]
    rate: Option<f64>,
    /// Makes idempotency keys differ between runs.
    #[arg(long, default_value = "run")]
    run: String,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // What `cargo bench` passes: there is nothing to measure without the script.
    if std::env::args().any(|a| a == "--bench") {
        println!("see benches/run.sh");
        return Ok(());
    }
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build();
    match Arguments::parse() {
        Arguments::Publish(publish) => {
            let outcome = runtime()?.block_on(publish::run(&publish))?;
            println!("{}", outcome.json());
        }
        Arguments::Receive { listen } => {
            let seen = receive::Seen::default();
            runtime()?.block_on(receive::serve(listen, seen))?;
        }
        Arguments::Deliver { publish, receiver, drain_seconds } => {
            let seen = receive::Seen::default();
            // On a thread of its own: a busy sender must not make the receiver look slow.
            let (server, own) = (runtime()?, seen.clone());
            std::thread::spawn(move || server.block_on(receive::serve(receiver, own)));
            let begin = Instant::now();
            let outcome = runtime()?.block_on(publish::run(&publish))?;
            let published = begin.elapsed();
            let mut result = outcome.json();
            let deadline = Instant::now() + Duration::from_secs(drain_seconds);
            while seen.distinct() < outcome.accepted && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
            // What arrives a second time usually does so soon after.
            std::thread::sleep(Duration::from_millis(500));
            seen.report(begin, &outcome.sent, &mut result);
            result["publish_seconds"] = published.as_secs_f64().into();
            println!("{result}");
        }
    }
    Ok(())
}
