//! `vmcache`: the daemon and its command line, all in the library's `cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(vmcache::cli::main())
}
