//! `vmcache config check` and `show`.

use super::args::{Common, ConfigCommand};
use super::Outcome;
use crate::config::{markdown, show, Config};

/// Checks or shows.
pub fn config(common: &Common, command: &ConfigCommand) -> Outcome {
    if let ConfigCommand::Show { options: true } = command {
        print!("{}", markdown());
        return Ok(0);
    }
    let config = Config::load(common.config.as_deref())?;
    for line in &config.warnings {
        eprintln!("vmcache: warning: {line}");
    }
    match command {
        ConfigCommand::Check => {
            config.check_files()?;
            let files: Vec<_> = config.files.iter().map(|f| f.display().to_string()).collect();
            println!("{}: good, {} warnings", files.join(", "), config.warnings.len());
        }
        ConfigCommand::Show { .. } => print!("{}", show(&config)),
    }
    Ok(0)
}
