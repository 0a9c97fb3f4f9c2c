//! The balloon: a guest's free memory given back to the host before the VM
//! waits in a pool.
//!
//! It is blown up until the guest has nothing more to spare, page cache
//! included, and let down again: the guest then has all its memory, most of it
//! untouched, and the host keeps only what is in use.
//!
//! Invariant: only for VMs whose memory is their own. QEMU 7.2 gives pages back
//! by punching holes into the file behind them, which for a clone would be its
//! template's: for all other clones, too. So a clone has no such device.
//!
//! Source: virtio 1.2, 5.5; QEMU's qapi/machine.json.

use std::time::{Duration, Instant};

use serde_json::json;

use super::qmp::{Error, Qmp, QUICK};

/// Asked of the guest as the memory to keep: less than any can, in bytes. Its
/// driver stops by itself when an allocation fails.
const KEEP: u64 = 16 << 20;
/// Pause between looks at the balloon's size.
const LOOK: Duration = Duration::from_millis(20);
/// Looks without a change, after which the guest has no more to give.
const STEADY: u32 = 10;
/// The same before it has given anything: it may only be slow to begin.
const NO_START: u32 = 50;
/// Until it must have given what it can.
const BLOWING: Duration = Duration::from_secs(3);
/// Until it must have all of it again.
const LETTING: Duration = Duration::from_secs(10);

/// Has the guest give back, within so long, what it does not use; how much that
/// was, in bytes.
/// A guest without a driver for it gives nothing.
///
/// # Errors
/// When QEMU does not answer, or the guest does not take its memory again: the
/// VM is then of no use.
pub fn give_back(qmp: &mut Qmp, within: Duration) -> Result<u64, Error> {
    let end = Instant::now() + within;
    let whole = actual(qmp)?;
    if whole <= KEEP {
        return Ok(0);
    }
    set(qmp, KEEP)?;
    // Letting it down must fit too.
    let deadline = (Instant::now() + BLOWING).min(end - within / 2);
    let (mut least, mut same) = (whole, 0);
    let enough = |least| if least == whole { NO_START } else { STEADY };
    while same < enough(least) && least > KEEP && Instant::now() < deadline {
        pause(qmp);
        let now = actual(qmp)?;
        same = if now < least { 0 } else { same + 1 };
        least = least.min(now);
    }
    set(qmp, whole)?;
    let deadline = (Instant::now() + LETTING).min(end);
    while actual(qmp)? < whole {
        if Instant::now() > deadline {
            return Err(qmp.silent("the return of the balloon's memory", LETTING));
        }
        pause(qmp);
    }
    Ok(whole - least)
}

/// What the guest has, in bytes.
fn actual(qmp: &mut Qmp) -> Result<u64, Error> {
    Ok(qmp.execute("query-balloon", None, QUICK)?["actual"].as_u64().unwrap_or(0))
}

fn set(qmp: &mut Qmp, bytes: u64) -> Result<(), Error> {
    qmp.execute("balloon", Some(json!({"value": bytes})), QUICK).map(|_| ())
}

/// QEMU tells of changes only once a second, so its events are merely a way to wait.
fn pause(qmp: &mut Qmp) {
    let until = Instant::now() + LOOK;
    while qmp.next_event("a change of the balloon", until, LOOK).is_ok() {}
}
