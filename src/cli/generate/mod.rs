//! `vmcache generate`: the manual's pages, completions and a package's configuration, all
//! from what the program itself knows. For whoever makes a package.

mod commands;
mod manual;
mod security;

use std::io;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::{generate as generate_completions, Generator, Shell};
use nix::unistd::geteuid;

use super::args::{Cli, Generate};
use super::output::{Failure, FAILED};
use super::Outcome;
use crate::config::sample;
use crate::trusted_path::{Destination, Kind, TrustedPath};

/// Permissions of the directory, where it is made.
const DIRECTORY: u32 = 0o755;

/// Writes all of it.
pub fn generate(g: &Generate) -> Outcome {
    write(&g.output).map(|()| 0).map_err(|e| {
        Failure::new(FAILED, format!("write the manual to {}: {e}", g.output.display()))
    })
}

fn write(dir: &Path) -> io::Result<()> {
    if geteuid().is_root() {
        TrustedPath::make_directory(dir, DIRECTORY, Kind::SharedDirectory)?;
    } else {
        std::fs::create_dir_all(dir)?;
    }
    let put = |name: &str, bytes: &[u8]| Destination::named(&dir.join(name))?.replace(bytes);
    for (name, page) in manual::pages()? {
        put(&name, &page)?;
    }
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let mut text = Vec::new();
        generate_completions(shell, &mut Cli::command(), "vmcache", &mut text);
        put(&shell.file_name("vmcache"), &text)?;
    }
    put("configuration.toml", sample(true).as_bytes())
}
