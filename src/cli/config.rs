//! `vmcache config check`, `show` and `import`.

use std::path::Path;

use super::args::{Common, ConfigCommand};
use super::output::{Failure, FAILED, USAGE};
use super::{print, Outcome};
use crate::config::served::Served;
use crate::config::{markdown, sample, show, Config};
use crate::factory::grpccache::GrpcCache;
use crate::trusted_path::Destination;
use crate::vm::config::import::to_toml;
use crate::vm::VmConfig;

/// Checks or shows.
pub fn config(common: &Common, command: &ConfigCommand) -> Outcome {
    if let ConfigCommand::Show { options: true } = command {
        print::block(markdown())?;
        return Ok(0);
    }
    if let ConfigCommand::Sample = command {
        print::block(sample(false))?;
        return Ok(0);
    }
    if let ConfigCommand::Import { from_endpoint, output } = command {
        return import(from_endpoint, output);
    }
    let config = Config::load(common.config.as_deref())?;
    for line in &config.warnings {
        print::message(format!("warning: {line}"));
    }
    match command {
        ConfigCommand::Check => {
            config.check_files()?;
            // Whether users are to be had is for who can give them.
            let users = match nix::unistd::geteuid().is_root() {
                true => config.check_user()?,
                false => Vec::new(),
            };
            for line in &users {
                print::message(format!("warning: {line}"));
            }
            let warnings = config.warnings.len() + users.len();
            let files: Vec<_> = config.files.iter().map(|f| f.display().to_string()).collect();
            print::line(format!("{}: good, {warnings} warnings", files.join(", ")))?;
        }
        ConfigCommand::Import { .. } | ConfigCommand::Sample => {}
        ConfigCommand::Show { .. } => print::block(show(&config))?,
    }
    Ok(0)
}

/// Takes over what another server tells its clients, to the letter.
fn import(endpoint: &Path, output: &Path) -> Outcome {
    if output.symlink_metadata().is_ok() {
        let text = format!("{} exists: name another, or remove it", output.display());
        return Err(Failure::new(USAGE, text));
    }
    let beside = output.with_extension("served.json");
    let place = |path: &Path| {
        Destination::named(path)
            .and_then(|place| place.check_replaceable().map(|()| place))
            .map_err(|e| Failure::new(FAILED, format!("write {}: {e}", path.display())))
    };
    // Before anybody is asked for what could not be written.
    let (toml_place, json_place) = (place(output)?, place(&beside)?);
    let server = GrpcCache::connect(endpoint)?;
    let message = server.fetch_config_raw()?;
    let pool = server.fetch_status()?.vmstatus.len().max(1);
    let failed = |what: &str, e: &dyn std::error::Error| {
        Failure::new(FAILED, format!("{what} of the server at {}: {e}", endpoint.display()))
    };
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).map_err(|e| failed("Config", &e));
    let served = Served { data: text(message.Data)?, agent: text(message.AgentConfig)? };
    let told = VmConfig::parse(served.data.as_bytes()).map_err(|e| failed("Config", &e))?;
    let write = |place: &Destination, text: &str| {
        let failed = |e| Failure::new(FAILED, format!("write {}: {e}", place.path().display()));
        place.replace(text.as_bytes()).map_err(failed)
    };
    let absolute = std::path::absolute(&beside).unwrap_or_else(|_| beside.clone());
    let endpoint = endpoint.display().to_string();
    let toml = to_toml(&told, &absolute.display().to_string(), &endpoint, pool);
    let json = serde_json::to_string(&served).map_err(|e| failed("Config", &e))?;
    write(&json_place, &json)?;
    write(&toml_place, &toml)?;
    // What was written must be a configuration.
    Config::read(output)?;
    let (output, beside) = (output.display(), beside.display());
    print::line(format!("{output}: VMs for clients of that server ({beside})"))?;
    Ok(0)
}
