//! Arguments → [`dealscale::cli`] → exit code, nothing else.

use std::process::ExitCode;

/// An event makes some hundred small allocations, most of them freed by another thread: glibc took a seventh of all CPU for that, much
/// of it waiting for its own locks (docs/benchmarks.md).
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    dealscale::cli::run()
}
