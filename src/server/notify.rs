//! Telling systemd: sd_notify's protocol, a datagram to `$NOTIFY_SOCKET`.

use std::env;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Sends a state such as `READY=1`; nothing where nobody asked.
pub fn state(text: &str) {
    let Some(path) = env::var_os("NOTIFY_SOCKET").filter(|p| !p.is_empty()) else { return };
    let address = match path.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&path),
    };
    let sent = address
        .and_then(|a| Ok((UnixDatagram::unbound()?, a)))
        .and_then(|(socket, a)| socket.send_to_addr(text.as_bytes(), &a));
    if let Err(e) = sent {
        log::warn!("notify systemd at {}: {e}", path.to_string_lossy());
    }
}

/// A restart: READY follows.
pub fn reloading() {
    let clock = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    let now = clock.map_or(0, |t| t.tv_sec() as u64 * 1_000_000 + t.tv_nsec() as u64 / 1000);
    state(&format!("RELOADING=1\nMONOTONIC_USEC={now}\nSTATUS=restarting"));
}
