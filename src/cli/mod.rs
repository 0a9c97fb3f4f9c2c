//! The command line program: one file a command, and what they share.
//!
//! Commands return an error with its exit code; nothing here calls `exit` but
//! `main` and a signal that comes before there is anything to clean up.

mod agent;
pub mod args;
mod attach;
mod bench;
mod claimed;
mod config;
mod copy;
mod doctor;
mod escape;
mod generate;
mod guest;
mod interrupt;
mod logging;
mod metrics;
mod mkinitrd;
mod output;
mod print;
mod progress;
mod proxy;
mod run;
mod session;
mod status;
mod streams;
mod template;
mod terminal;

use std::ffi::OsString;
use std::path::PathBuf;

use args::{Cli, Command, Common, Factory, Json, Template};
use output::{Failure, FAILED, USAGE};

use crate::config::options::FACTORY;
use crate::config::{endpoint_alone, locate, options, Config, Error as ConfigError};
use crate::factory::grpccache::GrpcCache;
use crate::server::handover;
use crate::trusted_path::TrustedPath;

/// What a command gives: the exit code.
pub type Outcome = Result<u8, Failure>;

/// Parses, dispatches, reports; the exit code.
pub fn main() -> u8 {
    let args = proxy::as_clap_takes_them(std::env::args_os().collect());
    let cli = match <Cli as clap::Parser>::try_parse_from(&args) {
        Ok(cli) => cli,
        // What it quotes may be another program's: names of files, for one.
        Err(e) if e.use_stderr() => {
            let which = no_text(&args).filter(|_| e.kind() == clap::error::ErrorKind::InvalidUtf8);
            print::usage(which.unwrap_or_else(|| e.render().to_string()));
            return output::USAGE;
        }
        Err(e) => return print::help(&e).map_or_else(|failure| failure.report(), |()| 0),
    };
    let result = logging::start(&cli).and_then(|()| dispatch(cli));
    match result {
        Ok(code) => code,
        Err(failure) => failure.report(),
    }
}

/// The arguments that are no text: clap does not say which it means.
fn no_text(args: &[OsString]) -> Option<String> {
    let bad = args.iter().filter(|arg| arg.to_str().is_none()).map(|arg| format!("{arg:?}"));
    let bad: Vec<_> = bad.collect();
    let text = "is no UTF-8 text; only files' names need not be";
    (!bad.is_empty()).then(|| format!("error: {}, {text}\n", bad.join(", or ")))
}

/// Kata's `factory`: the cache's server when there is one, or else the template.
fn factory(common: &Common, command: Factory) -> Outcome {
    let json = Json { json: false };
    let alone =
        optional_config(common)?.is_some_and(|c| c.pool == 0 && c.flag(FACTORY, "enable_template"));
    match (command, alone) {
        (Factory::Init, true) => template::template(common, &Template::Create(json)),
        (Factory::Status(s), true) => template::template(common, &Template::Status(s.json)),
        (Factory::Destroy, true) => template::template(common, &Template::Destroy(json)),
        (Factory::Init, false) => serve(common),
        (Factory::Status(s), false) => status::status(common, &s),
        (Factory::Destroy, false) => {
            connect(common)?.quit()?;
            Ok(0)
        }
    }
}

fn dispatch(cli: Cli) -> Outcome {
    let common = cli.common;
    match cli.command {
        Command::Factory(command) => factory(&common, command),
        Command::Template(t) => template::template(&common, &t),
        Command::Serve => serve(&common),
        Command::Status(s) => status::status(&common, &s),
        Command::Quit(q) if q.leave => status::leave(&common),
        Command::Quit(_) => {
            connect(&common)?.quit()?;
            Ok(0)
        }
        Command::Restart => status::restart(&common),
        Command::Drain => status::drain(&common),
        Command::Resize(r) => {
            connect(&common)?.resize(r.target)?;
            Ok(0)
        }
        Command::Get(g) => run::get(&common, &g),
        Command::Run(r) => run::run(&common, &r).map_err(Failure::in_vmcache),
        Command::Exec(e) => run::exec(&common, &e).map_err(Failure::in_vmcache),
        Command::Cp(c) => copy::cp(&common, &c),
        Command::Kill(k) => claimed::kill(&common, &k),
        Command::Ps(o) => claimed::ps(&common, &o),
        Command::Stats(o) => claimed::stats(&common, &o),
        Command::Pause(o) => claimed::pause(&common, &o),
        Command::Resume(o) => claimed::resume(&common, &o),
        Command::Stop(m) => claimed::stop(&common, &m),
        Command::List(j) => claimed::list(&common, j),
        Command::Doctor(d) => doctor::doctor(&common, &d),
        Command::Bench(b) => bench::bench(&common, &b),
        Command::Guest(args::Guest::Build(g)) => guest::build(&common, &g),
        Command::Generate(g) => generate::generate(&g),
        Command::Mkinitrd(m) => mkinitrd::mkinitrd(&m),
        Command::Agent(a) => agent::agent(&a),
        Command::Proxy(p) => proxy::proxy(&p),
        Command::Config(c) => config::config(&common, &c),
    }
}

/// The configuration of a server.
fn served(common: &Common) -> Result<Config, ConfigError> {
    let config = Config::load(common.config.as_deref())?;
    match &common.endpoint {
        Some(endpoint) => config.at_endpoint(endpoint),
        None => Ok(config),
    }
}

fn serve(common: &Common) -> Outcome {
    let config = served(common)?;
    if config.pool == 0 {
        let place = config.place(options::FACTORY, "vm_cache_number");
        print::line(format!("VMCache is off: vm_cache_number is 0 or not set ({place})"))?;
        // Switched off is no failure: whoever started it hears that it was ready to end.
        crate::notify::state("READY=1\nSTATUS=off: vm_cache_number is 0 or not set");
        return Ok(0);
    }
    let own = common.clone();
    let program = handover::program()
        .map_err(|e| Failure::new(FAILED, format!("find this server's program: {e}")))?;
    let (endpoint, store) = (config.endpoint(), config.store());
    let again = move || {
        let config = served(&own).and_then(|c| c.check_host().map(|()| c));
        let config = config.map_err(|e| crate::report::chain(&e))?;
        TrustedPath::program(&program).map_err(|e| format!("{}: {e}", program.display()))?;
        if config.endpoint() != endpoint || config.store() != store {
            let text = "vm_cache_endpoint or vm_store_path is another one: its VMs and clients \
                        would be lost; stop the server and start it";
            return Err(text.into());
        }
        match config.pool {
            0 => Err("vm_cache_number is 0: to switch the pool off, stop the server".into()),
            _ => Ok(()),
        }
    };
    crate::server::serve(config, std::sync::Arc::new(again))?;
    Ok(0)
}

/// The configuration, or `None` when none is named and none is found.
fn optional_config(common: &Common) -> Result<Option<Config>, Failure> {
    found(common).map_err(Failure::from)
}

fn found(common: &Common) -> Result<Option<Config>, ConfigError> {
    match Config::load(common.config.as_deref()) {
        Ok(config) => Ok(Some(config)),
        Err(ConfigError::NotFound { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The server's socket.
fn endpoint(common: &Common) -> Result<PathBuf, Failure> {
    if let Some(endpoint) = &common.endpoint {
        return Ok(endpoint.clone());
    }
    let default = "/var/run/kata-containers/cache.sock";
    match found(common) {
        Ok(config) => Ok(config.map_or_else(|| default.into(), |c| c.endpoint())),
        // Whoever wrote it would say whom to ask.
        Err(e) if e.untrusted() => {
            let remedy = "; with `--endpoint SOCKET` no configuration is needed";
            Err(Failure::of(USAGE, &e).and(remedy))
        }
        Err(broken) => {
            let broken = Failure::from(broken);
            let file = locate(common.config.as_deref()).ok();
            let endpoint = file.and_then(|f| endpoint_alone(&f)).filter(|e| e.exists());
            let endpoint = endpoint.ok_or_else(|| broken.clone())?;
            let text = format!("warning: {broken}; asking the server that runs nevertheless");
            print::message_in_lines(text);
            Ok(endpoint)
        }
    }
}

/// The configuration by which this side's wishes are known: one that was
/// named, or that of the very server that is asked.
fn own_config(common: &Common) -> Result<Option<Config>, Failure> {
    let named = common.config.is_some() || std::env::var_os("VMCACHE_CONFIG").is_some();
    let config = match found(common) {
        // Nobody has named it, and the server is named without it.
        Err(e) if e.untrusted() && !named && common.endpoint.is_some() => {
            print::message(format!("warning: {}: it is not read", crate::report::chain(&e)));
            None
        }
        config => config?,
    };
    let asked = endpoint(common)?;
    Ok(config.filter(|c| named || c.endpoint() == asked))
}

fn connect(common: &Common) -> Result<GrpcCache, Failure> {
    Ok(GrpcCache::connect(&endpoint(common)?)?)
}
