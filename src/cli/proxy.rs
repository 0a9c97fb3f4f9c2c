//! `vmcache proxy`: beside each VM whose agent is one of Kata 1.x on a serial port.
//!
//! Takes the options of Kata's kata-proxy as that takes them, with one dash, and is
//! one when it is started under that name.

use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use crossbeam_channel::{bounded, Receiver};
use nix::sys::signal::{SigSet, Signal};

use super::args::Proxy;
use super::output::{Failure, FAILED, USAGE};
use super::Outcome;
use crate::transport::proxy::{serve, socket_path, Options};
use crate::worker::Worker;

/// kata-proxy's options, and what they are called here.
const OPTIONS: [(&str, &str); 7] = [
    ("listen-socket", "--listen-socket"),
    ("mux-socket", "--mux-socket"),
    ("sandbox", "--sandbox"),
    ("agent-logs-socket", "--agent-logs-socket"),
    ("log", "--log-level"),
    ("debug", "--debug"),
    ("version", "--version"),
];

/// A command line as clap takes it: Go's options have one dash or two.
pub fn as_clap_takes_them(args: Vec<OsString>) -> Vec<OsString> {
    let own_name = args.first().map(Path::new).and_then(Path::file_name);
    let (mut out, rest) = match own_name {
        Some(name) if name == "kata-proxy" => {
            (vec!["vmcache".into(), "proxy".into()], args.get(1..).unwrap_or_default())
        }
        _ if args.get(1).is_some_and(|a| a == "proxy") => (args[..2].to_vec(), &args[2..]),
        _ => return args,
    };
    for arg in rest {
        let text = arg.to_string_lossy();
        let name = text.strip_prefix("--").or(text.strip_prefix('-')).unwrap_or_default();
        let (name, value) = name.split_once('=').map_or((name, None), |(n, v)| (n, Some(v)));
        let Some((_, ours)) = OPTIONS.iter().find(|(theirs, _)| *theirs == name) else {
            out.push(arg.clone());
            continue;
        };
        out.push(value.map_or(ours.to_string(), |v| format!("{ours}={v}")).into());
    }
    out
}

/// Serves until its VM ends, or SIGTERM.
pub fn proxy(p: &Proxy) -> Outcome {
    let socket = |option: &str, text: &str| -> Result<PathBuf, Failure> {
        socket_path(text).ok_or_else(|| {
            Failure::new(USAGE, format!("-{option} {text:?}: must be a path, or unix:PATH"))
        })
    };
    let options = Options {
        listen: socket("listen-socket", &p.listen_socket)?,
        mux: socket("mux-socket", &p.mux_socket)?,
        console: match &p.agent_logs_socket {
            Some(text) => Some(socket("agent-logs-socket", text)?),
            None => None,
        },
        sandbox: p.sandbox.clone(),
    };
    let stop = on_signal().map_err(|e| Failure::new(FAILED, format!("wait for signals: {e}")))?;
    serve(&options, &stop).map_err(|e| Failure::of(FAILED, &e))?;
    Ok(0)
}

/// Closes when this process is asked to end.
fn on_signal() -> io::Result<Receiver<()>> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        set.add(signal);
    }
    set.thread_block()?;
    // Never filled: it only tells, by closing.
    let (tell, stop) = bounded::<()>(1);
    Worker::spawn("vmc-signals", move || {
        let _ = set.wait();
        drop(tell);
    })
    .map_err(io::Error::other)?;
    Ok(stop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_taken_as_kata_proxy_takes_them() {
        let taken = |line: &str| {
            let args = line.split(' ').map(OsString::from).collect();
            let out: Vec<_> =
                as_clap_takes_them(args).into_iter().map(|a| a.into_string().unwrap()).collect();
            out.join(" ")
        };
        let clap = "vmcache proxy --listen-socket unix:///p --mux-socket=/m --log-level debug";
        assert_eq!(taken("vmcache proxy -listen-socket unix:///p -mux-socket=/m -log debug"), clap);
        assert_eq!(
            taken("/x/kata-proxy --listen-socket unix:///p -mux-socket=/m -log debug"),
            clap
        );
        assert_eq!(taken("vmcache run -listen-socket"), "vmcache run -listen-socket");
    }
}
