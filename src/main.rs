//! Arguments → [`dealscale::cli`] → exit code, nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    dealscale::cli::run()
}
