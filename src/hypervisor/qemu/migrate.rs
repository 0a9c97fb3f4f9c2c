//! Saving a VM's device state and loading it into another QEMU: migration, with
//! the memory left in a file that both map.
//!
//! Invariants: nothing is executed (`exec:` is a shell, and `-sandbox
//! spawn=deny` forbids it): the state goes through an fd that is passed over
//! QMP. Every wait has a deadline.
//!
//! Source: QEMU's docs/devel/migration and qapi/migration.json.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use crossbeam_channel::{after, Receiver};
use serde_json::json;

use super::qmp::{Error, Qmp, QUICK};

/// Name under which QEMU knows the passed fd.
const NAME: &str = "vmcache-state";
/// How often a running migration is asked about: it takes a few milliseconds,
/// and QEMU's events of it are not all in the versions that are supported.
const LOOK: Duration = Duration::from_millis(1);

/// Memory that is in a shared file is not part of the state.
fn ignore_shared(qmp: &mut Qmp) -> Result<(), Error> {
    let capabilities = json!([{"capability": "x-ignore-shared", "state": true}]);
    let arguments = json!({"capabilities": capabilities});
    qmp.execute("migrate-set-capabilities", Some(arguments), QUICK).map(|_| ())
}

fn pass(qmp: &mut Qmp, state: BorrowedFd<'_>) -> Result<String, Error> {
    qmp.execute_with("getfd", Some(json!({"fdname": NAME})), Some(state), QUICK)?;
    Ok(format!("fd:{NAME}"))
}

/// Writes the device state of a paused VM into `state`.
///
/// # Errors
/// See [`Error`]; so with [`load`].
pub fn save(qmp: &mut Qmp, state: BorrowedFd<'_>, within: Duration) -> Result<(), Error> {
    ignore_shared(qmp)?;
    let uri = pass(qmp, state)?;
    qmp.execute("migrate", Some(json!({"uri": uri})), QUICK)?;
    let deadline = Instant::now() + within;
    loop {
        let answer = qmp.execute("query-migrate", None, QUICK)?;
        match answer["status"].as_str().unwrap_or_default() {
            "completed" => return Ok(()),
            "failed" | "cancelled" => {
                let why = answer["error-desc"].as_str().unwrap_or("QEMU gives no reason");
                return Err(refused("migrate", why));
            }
            other if Instant::now() >= deadline => {
                return Err(refused("migrate", &format!("still {other} after {within:.0?}")));
            }
            _ => pause(),
        }
    }
}

/// Loads a device state into a QEMU that was started with `-incoming defer`;
/// the VM is then paused, as it was when it was saved.
pub fn load(qmp: &mut Qmp, state: BorrowedFd<'_>, within: Duration) -> Result<(), Error> {
    ignore_shared(qmp)?;
    let uri = pass(qmp, state)?;
    qmp.execute("migrate-incoming", Some(json!({"uri": uri})), QUICK)?;
    let deadline = Instant::now() + within;
    loop {
        // A QEMU whose incoming migration fails exits, which ends this too.
        let answer = qmp.execute("query-status", None, QUICK)?;
        match answer["status"].as_str().unwrap_or_default() {
            "inmigrate" if Instant::now() < deadline => pause(),
            "inmigrate" => {
                let why = format!("not loaded after {within:.0?}");
                return Err(refused("migrate-incoming", &why));
            }
            _ => return Ok(()),
        }
    }
}

fn pause() {
    let tick: Receiver<Instant> = after(LOOK);
    let _ = tick.recv();
}

fn refused(command: &str, why: &str) -> Error {
    Error::Refused { command: command.into(), class: "Migration".into(), text: why.into() }
}
