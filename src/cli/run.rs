//! `vmcache get`, `run` and `exec`.
//!
//! Invariant: a VM that `run` claimed without `--keep` is leased: it ends with
//! this process, however that ends, because dropping it destroys it, and
//! because the server (for a cold one, the kernel) ends it when this process
//! is gone.

use std::ffi::OsString;
use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::args::{Common, Exec, Get, Process, Run};
use super::attach::Attachments;
use super::claimed::{find_vm, reach};
use super::output::{Failure, IN_VMCACHE, USAGE};
use super::progress::Progress;
use super::session::Session;
use super::terminal::Terminal;
use super::{connect, own_config, print, Outcome};
use crate::config::options::QEMU;
use crate::factory::grpccache::{Error, GrpcCache};
use crate::factory::{direct, Factory, Obtained, Wanted};
use crate::ids;
use crate::process::attendant::Role;
use crate::vm::{Birth, VmConfig};
use crate::worker::Worker;
use crate::workload::{send_root, Command, Guest, WRITING_OUT};

/// For a guest that has been given up, to write out its disks.
const HURRY: Duration = Duration::from_secs(2);

/// Claims a VM, wakes it, prints it, and leaves it to the caller.
pub fn get(common: &Common, g: &Get) -> Outcome {
    let session = Session::start()?;
    // Until its id is out, nobody else could end it.
    let wanted = g.size.within(g.wait);
    let server = connect(common)?.labelled(&g.label).leasing_until_kept();
    let server = server.growing(wanted.cpus, wanted.memory_mib);
    let own = own_config(common)?;
    let progress = Progress::start("waiting for a VM");
    let born = |birth: Birth<'_>| session.hold(birth);
    let obtained = Factory::new(&server, own.as_ref()).born(&born).get_vm(&wanted)?;
    drop(progress);
    let Obtained { vm, agent, fallback } = obtained;
    drop(agent);
    let cold = fallback.is_some();
    let shown = json!({
        "id": vm.id(), "pid": vm.pid(), "qmp": vm.monitor(),
        "agent_url": vm.agent_address().to_string(), "source": vm.source(),
        "cpus": vm.cpus(), "memory_mib": vm.memory_mib(), "fallback": fallback,
    });
    // Before its id is out: whoever reads that may own it at once.
    session.release();
    // Nobody knows of it when this fails: it ends then.
    match g.json.json {
        true => print::json(&shown)?,
        false => print::line(vm.id())?,
    }
    let id = vm.id().to_string();
    vm.let_go();
    if cold {
        return Ok(0);
    }
    kept(&server, &id).map(|()| 0)
}

/// The VM outlives this process.
fn kept(server: &GrpcCache, id: &str) -> Result<(), Failure> {
    match server.keep(id) {
        // Whoever has read its id may have ended it already.
        Ok(()) | Err(Error::Unsupported { .. } | Error::Gone { .. }) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// The command that the options describe.
fn command(p: &Process, terminal: Option<&Terminal>) -> Result<Command, Failure> {
    let (program, args) =
        p.command.split_first().ok_or_else(|| Failure::new(USAGE, "no command to run"))?;
    let mut command = Command::new(program).args(args).workdir(&p.workdir);
    for pair in &p.env {
        command = variable(command, pair)?;
    }
    if let Some(user) = &p.user {
        // Before a VM is claimed for it.
        ids::check(user).map_err(|e| Failure::new(USAGE, format!("--user: {e}")))?;
        command = command.user(user);
    }
    if let Some(terminal) = terminal {
        let (rows, columns) = terminal.size();
        command = command.terminal(rows, columns);
        if let Ok(term) = std::env::var("TERM") {
            command = command.env_or("TERM", &term);
        }
    }
    Ok(command)
}

/// Sets a variable as docker's `-e` does: one without a value has this process's, and is taken
/// back if that has none.
fn variable(command: Command, pair: &str) -> Result<Command, Failure> {
    let (key, value) = match pair.split_once('=') {
        Some((key, value)) => (key, Some(value.to_string())),
        None => (
            pair,
            std::env::var_os(pair).map(OsString::into_string).transpose().map_err(|_| {
                Failure::new(USAGE, format!("--env {pair}: its value is no UTF-8 text"))
            })?,
        ),
    };
    if key.is_empty() {
        return Err(Failure::new(USAGE, format!("--env {pair:?}: the variable has no name")));
    }
    Ok(match value {
        Some(value) => command.env(key, &value),
        None => command.env_remove(key),
    })
}

/// Runs a command in a VM of its own.
pub fn run(common: &Common, r: &Run) -> Outcome {
    let terminal = r.process.tty.then(Terminal::open).transpose()?;
    let command = command(&r.process, terminal.as_ref())?;
    if let Some(root) = &r.rootfs {
        check_root(root)?;
    }
    let session = Session::start()?;
    let attachments = Attachments::open(common, r)?;
    let wanted = r.size.within(r.wait);
    let (mut guest, server) = match r.cold {
        true => (cold(common, r, &wanted, &session)?, None),
        false => {
            let (guest, server) = claim(common, r, &wanted, &session)?;
            (guest, Some(server))
        }
    };
    if let Some(why) = guest.fallback() {
        print::message(format!("warning: this VM was booted cold: the pool's differ ({why})"));
    }
    attachments.attach(&mut guest, !r.keep)?;
    let own_root = bring_root(common, r, &mut guest)? || attachments.root();
    let (expected, limit) = session.expect(r.process.timeout)?;
    let running = match own_root {
        true => guest.spawn_in_root(&command)?,
        false => guest.spawn(&command)?,
    };
    // A command may take days, and needs no connection; its VM has to be there until the
    // server knows what it was told of it.
    let told = server.map(|server| Worker::spawn("vmc-told", move || drop(server)));
    let input = !r.process.no_stdin;
    let ended = session.attach(&running, expected, terminal, input, limit);
    let ended = ended.map_err(Failure::of_ended_vm)?;
    if r.keep {
        session.release();
        if ended.known {
            guest.tidy();
        }
        let id = guest.vm().id().to_string();
        let pools = !guest.vm().ledger().endpoint.is_empty();
        print::bare_message(&id);
        guest.keep().let_go();
        if pools {
            kept(&connect(common)?, &id)?;
        }
    } else {
        if let Some(Ok(told)) = told {
            let _ = told.done().recv();
        }
        // A guest that does not answer is not waited for a second time.
        guest.stop(if ended.known { WRITING_OUT } else { HURRY })?;
    }
    Ok(ended.code)
}

/// Brings the root file system that was asked for; whether one was.
fn bring_root(common: &Common, r: &Run, guest: &mut Guest) -> Result<bool, Failure> {
    let Some(root) = &r.rootfs else { return Ok(false) };
    if !shared(common, guest, root, !r.keep)? {
        let _progress = Progress::start("sending the root file system");
        send_root(guest, root)?;
    }
    Ok(true)
}

/// Shares a root file system with the guest instead of copying it, where the VM was
/// made for that.
fn shared(common: &Common, guest: &mut Guest, root: &Path, leased: bool) -> Result<bool, Failure> {
    let usable = guest.vm().own_agent() && root.is_dir();
    let Some(config) = own_config(common)?.filter(|_| usable) else { return Ok(false) };
    if guest.vm().attendant(Role::Virtiofsd).is_some() {
        let daemon = config.text(QEMU, "virtio_fs_daemon").to_string();
        return Ok(guest.share_root(root, Path::new(&daemon), leased)?);
    }
    Ok(config.shares_9p() && guest.bind_root(root)?)
}

fn check_root(root: &Path) -> Result<(), Failure> {
    std::fs::metadata(root)
        .map(|_| ())
        .map_err(|e| Failure::new(USAGE, format!("--rootfs {}: {e}", root.display())))
}

/// A VM of the pool's, and the connection by which it came.
fn claim(
    common: &Common,
    r: &Run,
    wanted: &Wanted,
    session: &Session,
) -> Result<(Guest, GrpcCache), Failure> {
    let server = connect(common)?.growing(wanted.cpus, wanted.memory_mib);
    // Whose id is not out yet nobody else could end.
    let server = if r.keep { server.leasing_until_kept() } else { server.leasing() };
    let own = own_config(common)?;
    let _progress = Progress::start("waiting for a VM");
    let born = |birth: Birth<'_>| session.hold(birth);
    let factory = Factory::new(&server, own.as_ref()).leased(!r.keep).born(&born);
    let guest = factory.get_vm(wanted)?.into();
    Ok((guest, server))
}

/// Boots a VM for this command alone.
fn cold(common: &Common, r: &Run, wanted: &Wanted, session: &Session) -> Result<Guest, Failure> {
    let config = crate::config::Config::load(common.config.as_deref())?;
    config.check_files()?;
    log::debug!("booting {} CPUs, {} MiB", VmConfig::of(&config).cpus(), config.memory());
    let _progress = Progress::start("booting a VM");
    let born = |birth: Birth<'_>| session.hold(birth);
    let (vm, agent) = direct::cold(&config, wanted, !r.keep, &born)?;
    Ok(Guest::new(vm, agent))
}

/// Runs a command in a VM that was claimed before.
pub fn exec(common: &Common, e: &Exec) -> Outcome {
    let terminal = e.process.tty.then(Terminal::open).transpose()?;
    let command = command(&e.process, terminal.as_ref())?;
    let session = Session::start()?;
    let (expected, limit) = session.expect(e.process.timeout)?;
    let guest = reach(find_vm(common, &e.id)?)?;
    let input = !e.process.no_stdin;
    let result = guest.exec(&command).map_err(Failure::from).and_then(|running| {
        let ended = session.attach(&running, expected, terminal, input, limit);
        if running.id().exec.is_empty() && ended.as_ref().is_ok_and(|e| e.known) {
            let _ = guest.remove(&running.id().container);
        }
        ended.map(|e| e.code)
    });
    // Claimed by somebody who keeps it.
    guest.keep().let_go();
    result
}

/// The exit code of a command, as the shell would see it.
pub fn exit_code(status: i32) -> u8 {
    u8::try_from(status).unwrap_or(IN_VMCACHE)
}
