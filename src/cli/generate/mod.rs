//! `vmcache generate`: the manual's pages, completions and a package's configuration, all
//! from what the program itself knows. For whoever makes a package.

mod manual;

use std::fs;
use std::io;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::{generate_to, Shell};

use super::args::{Cli, Generate};
use super::output::{Failure, FAILED};
use super::Outcome;
use crate::config::sample;

/// Writes all of it.
pub fn generate(g: &Generate) -> Outcome {
    write(&g.output).map(|()| 0).map_err(|e| {
        Failure::new(FAILED, format!("write the manual to {}: {e}", g.output.display()))
    })
}

fn write(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    for (name, page) in manual::pages()? {
        fs::write(dir.join(name), page)?;
    }
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        generate_to(shell, &mut Cli::command(), "vmcache", dir)?;
    }
    fs::write(dir.join("configuration.toml"), sample(true))
}
