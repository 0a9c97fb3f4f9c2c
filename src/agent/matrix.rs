//! Which agent has which call, found by calling all of them.
//!
//! Each agent is given a connection whose far end is closed. What it can do then
//! fails for want of somebody to ask; only what it can not do is
//! [`Error::Unsupported`]. So the table can not say anything that the code does not.
//!
//! Does not: tell what a certain version of an agent lacks: that is known when it
//! answers. Footnotes tell what is known.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use super::seat::{ProxyCommand, Seat, Way};
use super::{
    hyperstart::Hyperstart, kata::grpc::Kata1Agent, kata::ttrpc::KataAgent, noop::Noop, Agent,
    Error, Kind, ListFormat, Outcome, ProcessId,
};
use crate::proto::agent::{CreateContainerRequest, Storage};
use crate::proto::cache::GrpcVM;
use crate::proto::oci::{Process, Spec};
use crate::proto::types::Interface;

/// A directory's name that no file system takes: so that trying makes none.
const NOWHERE: &str = "\0";
const SOON: Duration = Duration::from_secs(2);

/// Whether an agent has a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Support {
    /// It does.
    Yes,
    /// It does, and there is nothing to be done for it.
    NotNeeded,
    /// It does not: [`Error::Unsupported`].
    No,
}

impl Support {
    /// As tables show it.
    pub fn sign(self) -> &'static str {
        match self {
            Support::Yes => "yes",
            Support::NotNeeded => "not needed",
            Support::No => "no",
        }
    }
}

type Try = fn(&mut dyn Agent) -> Outcome<Support>;

fn done<T>(outcome: Outcome<T>) -> Outcome<Support> {
    outcome.map(|_| Support::Yes)
}

fn id() -> ProcessId {
    ProcessId { container: "c".into(), exec: "e".into() }
}

fn process() -> Process {
    Process { Args: vec!["true".into()], ..Process::default() }
}

fn container() -> CreateContainerRequest {
    let disk = Storage { driver: "blk".into(), ..Storage::default() };
    let spec = Spec { Process: Some(process()).into(), ..Spec::default() };
    CreateContainerRequest {
        container_id: "c".into(),
        storages: vec![disk],
        OCI: Some(spec).into(),
        ..CreateContainerRequest::default()
    }
}

/// Every call: its name here, and the one on the wire where it has one.
const CALLS: [(&str, &str, Try); 41] = [
    ("check", "Check", |a| done(a.check(SOON))),
    ("disconnect", "", |a| {
        a.disconnect();
        Ok(Support::Yes)
    }),
    ("start_proxy", "", |a| {
        let command = ProxyCommand {
            program: PathBuf::from(NOWHERE),
            subcommand: None,
            sandbox: String::new(),
            debug: false,
            leased: false,
        };
        a.start_proxy(&command).map(|p| p.map_or(Support::NotNeeded, |_| Support::Yes))
    }),
    ("set_proxy", "", |a| done(a.set_proxy("unix:///p"))),
    ("set_proxy_from_grpc", "", |a| done(a.set_proxy_from_grpc(&GrpcVM::default()))),
    ("agent_url", "", |a| Ok(if a.agent_url().is_empty() { Support::No } else { Support::Yes })),
    ("reuse", "", |a| {
        let other = super::at(a.address().clone());
        done(a.reuse(other))
    }),
    ("create_sandbox", "", |a| done(a.create_sandbox(NOWHERE))),
    ("exec", "ExecProcess", |a| done(a.exec(&id(), process()))),
    ("start_sandbox", "CreateSandbox", |a| done(a.start_sandbox(Default::default()))),
    ("stop_sandbox", "DestroySandbox", |a| done(a.stop_sandbox())),
    ("create_container", "CreateContainer", |a| done(a.create_container(container()))),
    ("start_container", "StartContainer", |a| done(a.start_container("c"))),
    ("stop_container", "RemoveContainer", |a| done(a.stop_container("c", SOON))),
    ("signal_process", "SignalProcess", |a| done(a.signal_process(&id(), 9))),
    ("winsize_process", "TtyWinResize", |a| done(a.winsize_process(&id(), 24, 80))),
    ("write_process_stdin", "WriteStdin", |a| done(a.write_process_stdin(&id(), vec![1]))),
    ("close_process_stdin", "CloseStdin", |a| done(a.close_process_stdin(&id()))),
    ("read_process_stdout", "ReadStdout", |a| done(a.read_process_stdout(&id(), 1))),
    ("read_process_stderr", "ReadStderr", |a| done(a.read_process_stderr(&id(), 1))),
    ("process_list_container", "ListProcesses", |a| {
        done(a.process_list_container("c", ListFormat::Table, &[]))
    }),
    ("update_container", "UpdateContainer", |a| done(a.update_container("c", Default::default()))),
    ("wait_process", "WaitProcess", |a| done(a.wait_process(&id(), Some(SOON)))),
    ("online_cpu_mem", "OnlineCPUMem", |a| done(a.online_cpu_mem(1, true))),
    ("mem_hotplug_by_probe", "MemHotplugByProbe", |a| done(a.mem_hotplug_by_probe(&[0]))),
    ("stats_container", "StatsContainer", |a| done(a.stats_container("c"))),
    ("pause_container", "PauseContainer", |a| done(a.pause_container("c"))),
    ("resume_container", "ResumeContainer", |a| done(a.resume_container("c"))),
    ("configure", "", |a| {
        done(a.configure(&Seat { dir: "/nonexistent".into(), way: Way::Serial }))
    }),
    ("configure_from_grpc", "", |a| done(a.configure_from_grpc(b"{}"))),
    ("vm_path", "", |a| {
        a.vm_path("/v".as_ref(), "x");
        Ok(Support::Yes)
    }),
    ("share_path", "", |a| {
        a.share_path("x");
        Ok(Support::Yes)
    }),
    ("reseed_rng", "ReseedRandomDev", |a| done(a.reseed_rng(&[1]))),
    ("update_interface", "UpdateInterface", |a| {
        done(a.update_interface(Interface { device: "e".into(), ..Interface::default() }))
    }),
    ("list_interfaces", "ListInterfaces", |a| done(a.list_interfaces())),
    ("update_routes", "UpdateRoutes", |a| done(a.update_routes(Vec::new()))),
    ("list_routes", "ListRoutes", |a| done(a.list_routes())),
    ("guest_details", "GetGuestDetails", |a| done(a.guest_details())),
    ("set_guest_date_time", "SetGuestDateTime", |a| done(a.set_guest_date_time(SOON))),
    ("copy_file", "CopyFile", |a| done(a.copy_file(Default::default()))),
    ("cleanup", "", |a| done(a.cleanup(NOWHERE))),
];

/// What a version of an agent is known to lack.
const NOTES: [(&str, &str); 3] = [
    ("ListProcesses", "Kata's agents of 2.1 and later have it no more and answer so; ours has it"),
    ("MemHotplugByProbe", "our agent has it where its kernel has /sys/devices/system/memory/probe"),
    ("UpdateRoutes", "hyperstart adds routes to those that there are"),
];

/// An agent whose connection leads nowhere.
fn dead(kind: Kind) -> Outcome<Box<dyn Agent>> {
    let closed = || {
        let failed = |source| Error::Host { during: "make a socket", source };
        UnixStream::pair().map(|(ours, _)| ours).map_err(failed)
    };
    Ok(match kind {
        Kind::Noop => Box::new(Noop),
        Kind::Kata => Box::new(KataAgent::over(closed()?)?),
        Kind::Kata1 => Box::new(Kata1Agent::over(closed()?)?),
        Kind::Hyperstart => Box::new(Hyperstart::over(closed()?, closed()?)?),
    })
}

/// One call, and who has it, in the order of [`Kind::ALL`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The method's name.
    pub method: &'static str,
    /// The call on the wire; empty for what only concerns the host.
    pub call: &'static str,
    /// Who has it.
    pub support: [Support; Kind::ALL.len()],
}

/// The whole table.
///
/// # Errors
/// When this host has no sockets or threads.
pub fn matrix() -> Outcome<Vec<Row>> {
    let mut rows = Vec::new();
    for (method, call, attempt) in CALLS {
        let mut support = [Support::No; Kind::ALL.len()];
        for (i, kind) in Kind::ALL.into_iter().enumerate() {
            support[i] = match attempt(&mut *dead(kind)?) {
                Ok(support) => support,
                Err(Error::Unsupported { .. }) => Support::No,
                // It tried.
                Err(_) => Support::Yes,
            };
        }
        rows.push(Row { method, call, support });
    }
    Ok(rows)
}

/// The same in Markdown.
///
/// # Errors
/// As [`matrix`].
pub fn markdown() -> Outcome<String> {
    let mut out = String::from("| method | call |");
    for kind in Kind::ALL {
        out.push_str(&format!(" {} |", kind.title()));
    }
    out.push_str("\n|---|---|");
    out.push_str(&"---|".repeat(Kind::ALL.len()));
    out.push('\n');
    for row in matrix()? {
        let note = NOTES.iter().position(|(call, _)| *call == row.call);
        let mark = note.map_or(String::new(), |i| format!(" ({})", i + 1));
        out.push_str(&format!("| `{}` | {}{mark} |", row.method, row.call));
        for support in row.support {
            out.push_str(&format!(" {} |", support.sign()));
        }
        out.push('\n');
    }
    out.push('\n');
    for (i, (_, note)) in NOTES.iter().enumerate() {
        out.push_str(&format!("({}) {note}.\n", i + 1));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_what_is_found_by_asking() {
        let rows = matrix().unwrap();
        let of = |method: &str| rows.iter().find(|r| r.method == method).unwrap().support;
        use Support::{No, NotNeeded, Yes};
        assert_eq!(of("check"), [Yes; 4]);
        assert_eq!(of("exec"), [No, Yes, Yes, Yes]);
        assert_eq!(of("start_proxy"), [NotNeeded, NotNeeded, Yes, NotNeeded]);
        assert_eq!(of("reseed_rng"), [No, Yes, Yes, No]);
        assert_eq!(of("signal_process"), [No, Yes, Yes, Yes]);
        // Every call of the interface, and none twice.
        let mut names: Vec<_> = rows.iter().map(|r| r.method).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), CALLS.len());
    }
}
