//! Telling systemd: sd_notify's protocol, a datagram to `$NOTIFY_SOCKET`.

use std::env;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::time::Duration;

use nix::sys::socket::{sendmsg, ControlMessage, MsgFlags, UnixAddr};

/// What systemd calls the socket that it keeps for the next server.
pub const STORED: &str = "vmcache-socket";

/// Whether somebody wants to be told.
pub fn wanted() -> bool {
    env::var_os("NOTIFY_SOCKET").is_some_and(|p| !p.is_empty())
}

/// How often somebody wants to hear that this process is well: twice in the time after
/// which it would be ended (sd_watchdog_enabled(3)).
pub fn watchdog() -> Option<Duration> {
    let number = |name: &str| env::var(name).ok()?.parse::<u64>().ok();
    let ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
    let limit = number("WATCHDOG_USEC").filter(|n| *n > 0 && ours && wanted())?;
    Some(Duration::from_micros(limit) / 2)
}

/// Sends a state such as `READY=1`; nothing where nobody asked. Whether it was taken: one
/// who does not listen is not waited for.
pub fn state(text: &str) -> bool {
    send(text, None)
}

/// Has systemd keep the socket, for the next server.
pub fn store(socket: &UnixListener) {
    send(&format!("FDSTORE=1\nFDNAME={STORED}"), Some(socket));
}

/// It need not any more.
pub fn forget() {
    state(&format!("FDSTOREREMOVE=1\nFDNAME={STORED}"));
}

fn send(text: &str, with: Option<&UnixListener>) -> bool {
    let Some(path) = env::var_os("NOTIFY_SOCKET").filter(|p| !p.is_empty()) else { return true };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => UnixAddr::new_abstract(name),
        None => UnixAddr::new(path.as_os_str()),
    };
    let fds: Vec<_> = with.iter().map(|s| s.as_fd().as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = &rights[..usize::from(!fds.is_empty())];
    let sent = address.map_err(io::Error::from).and_then(|to| {
        let from = UnixDatagram::unbound()?;
        let parts = [IoSlice::new(text.as_bytes())];
        Ok(sendmsg(
            from.as_raw_fd(),
            &parts,
            control,
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
            Some(&to),
        )?)
    });
    if let Err(e) = &sent {
        log::warn!("notify systemd at {}: {e}", path.to_string_lossy());
    }
    sent.is_ok()
}

/// A restart: READY follows.
pub fn reloading() -> bool {
    let clock = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    let now = clock.map_or(0, |t| t.tv_sec() as u64 * 1_000_000 + t.tv_nsec() as u64 / 1000);
    state(&format!("RELOADING=1\nMONOTONIC_USEC={now}\nSTATUS=restarting"))
}
