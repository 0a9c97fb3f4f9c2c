//! What happens, by name: the events that the log tells of, each with a level.
//!
//! A name is the beginning of its line, the MSGID in syslog's newer form and a row of
//! the manual. Invariants: names stay; a line tells of one event; its fields are those
//! of [`FIELDS`]. A VM is handed out once, so `vm` names its claim, too.
//!
//! Messages without a name are details of the named one before or after them. Of a kind, the
//! log has ten lines a second ([`limit`]).

pub mod limit;

use log::Level;
use Level::{Error, Info, Warn};

/// Something that happens.
#[derive(Debug)]
pub struct Event {
    /// What it is called.
    pub name: &'static str,
    /// For whom it is: an error is to be looked at, a warning to be known.
    pub level: Level,
    /// When it happens, and what there is to do.
    pub meaning: &'static str,
}

/// What lines have as fields, beside the text.
pub const FIELDS: [(&str, &str); 8] = [
    ("vm", "the VM's id, and so that of its claim"),
    ("qemu", "the pid of the VM's QEMU"),
    ("pid", "the process that asked, or has the VM"),
    ("uid", "its user"),
    ("peer", "what that user may do: all (direct), claim (claimer), or look (stranger)"),
    ("seconds", "how long it took"),
    ("phase", "what a boot was waiting for"),
    ("thread", "a thread of the server"),
];

macro_rules! events {
    ($($constant:ident $name:literal $level:ident $meaning:literal)*) => {
        $(#[doc = $meaning] pub const $constant: Event =
            Event { name: $name, level: $level, meaning: $meaning };)*
        /// All of them.
        pub const EVENTS: &[&Event] = &[$(&$constant),*];
    };
}

events! {
    SERVER_STARTED "server-started" Info "The server is there; the pool begins to fill."
    SERVER_STOPPING "server-stopping" Info "It stops, or restarts; by whom and why."
    SERVER_STOPPED "server-stopped" Info "It has ended."
    SERVER_RESTARTING "server-restarting" Info "It executes its program anew; VMs stay."
    RESTART_REFUSED "restart-refused" Error "A reload or restart would fail: the configuration that ran goes on. Mend what it names, and reload."
    QUIT "quit" Info "Somebody asked it to end."
    PANIC "panic" Error "A defect: the server ends with exit code 101; its VMs are the next one's. Please report it."
    STUCK "stuck" Error "A thread takes longer than it may. `vmcache restart`, or killing the server, loses no VM."
    STUCK_NO_MORE "stuck-no-more" Info "It has come to an end after all."
    LOG_LOST "log-lost" Warn "So many messages could not be sent to the log, before this one."
    VM_READY "vm-ready" Info "A VM was made and can be claimed."
    BOOT_FAILED "boot-failed" Error "A VM could not be made; what was missing, what QEMU and the guest wrote, and when the next try is."
    VM_CLAIMED "vm-claimed" Info "A VM went to a client."
    CLAIM_REFUSED "claim-refused" Warn "A claim got no VM; the client is told the same."
    CONNECTION_REFUSED "connection-refused" Warn "A user has, or makes, more connections than it may; which limit, and its option."
    PEER_SHUT "peer-shut" Warn "A connection asked for more than it may, or was too slow, and is shut; which limit, and its option. The client is told the same."
    UNDELIVERED "undelivered" Warn "A client went away while it was given a VM; that VM is destroyed."
    RELEASED "released" Info "A client does not want its VM any more; it is destroyed."
    RECLAIMED "reclaimed" Info "Who claimed a VM has ended, or never confirmed it; it is destroyed."
    VM_ENDED "vm-ended" Info "A VM that was handed out has ended; nothing of it is left."
    VM_DIED "vm-died" Error "A VM that stood ready has ended by itself; another is made."
    ATTENDANT_ENDED "attendant-ended" Info "A process beside a VM's QEMU has ended."
    REHEARSAL "rehearsal" Info "A VM's command that does nothing failed; its first real one will be slower."
    RETIRED "retired" Info "A VM that stood ready was ended: the pool has too many, or it is of an older configuration."
    ADOPTED "adopted" Info "A VM that stood ready is taken over from the server before."
    KEPT "kept" Info "A VM that a client has is followed on, from the server before."
    SWEPT "swept" Warn "What a killed server or client left half done is removed."
    POOL_RESIZED "pool-resized" Info "Another number of VMs is kept ready."
    POOL_DRAINED "pool-drained" Info "No VM is handed out any more, until it is resized."
    MEMORY_SHORT "memory-short" Warn "The host has too little memory for another VM; none is made until it has."
    MEMORY_ENOUGH "memory-enough" Info "It has again."
    TEMPLATE_MAKING "template-making" Info "A VM is booted to be cloned."
    TEMPLATE_READY "template-ready" Info "It can be cloned."
    TEMPLATE_REUSED "template-reused" Info "The template that there is fits."
    TEMPLATE_MISSING "template-missing" Info "There is none that fits; why."
    TEMPLATE_SUSPECT "template-suspect" Warn "Clones failed one after another: the template is made anew."
    TEMPLATE_COLD "template-cold" Info "The template ran no command before it was saved; its clones' first will be slower."
}

/// Logs an event: its constant, fields, and the text.
macro_rules! event {
    ($event:ident $(, $key:ident = $value:expr)*; $($text:tt)+) => {
        log::log!(
            $crate::events::$event.level,
            event = $crate::events::$event.name $(, $key:% = $value)*;
            $($text)+
        )
    };
}
pub(crate) use event;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_message_ids_each_once() {
        for (n, event) in EVENTS.iter().enumerate() {
            let plain = |b: u8| b.is_ascii_lowercase() || b == b'-';
            // RFC 5424, 6.2.7: at most 32 characters.
            assert!(event.name.len() <= 32 && event.name.bytes().all(plain), "{}", event.name);
            assert!(EVENTS[..n].iter().all(|e| e.name != event.name), "{}", event.name);
        }
    }
}
