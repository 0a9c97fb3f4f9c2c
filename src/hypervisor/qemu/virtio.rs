//! How far a guest's drivers are.
//!
//! vhost-device-vsock 0.3.0 stops carrying a guest's vsock for good when anything
//! happens on the host's side while its rings are off: before the guest's driver is
//! up, and while the VM is paused. QEMU tells when they are on a moment before the
//! device knows.
//!
//! Source: QEMU's qapi/virtio.json, since 7.2.

use std::time::{Duration, Instant};

use crossbeam_channel::after;
use serde_json::{json, Value};

use super::qmp::{self, Qmp, QUICK};

/// Pause between looks.
const RETRY: Duration = Duration::from_millis(20);
/// From QEMU's word that the rings are on until the device knows, and from the
/// last connection's end until it has seen it: some milliseconds, and then some.
pub const SETTLE: Duration = Duration::from_millis(50);
/// The driver is set up: as QEMU names it.
const DRIVER_OK: &str = "VIRTIO_CONFIG_S_DRIVER_OK";

/// Waits until a guest's driver uses a device. A QEMU before 7.2 can not tell, and
/// is not waited for.
///
/// # Errors
/// QEMU's; a guest that is not that far after `within`, or when what it needs is not
/// `there` any more, is no error, since whoever asks it next will tell.
pub fn await_driver(
    qmp: &mut Qmp,
    device: &str,
    there: impl Fn() -> bool,
    within: Duration,
) -> Result<(), qmp::Error> {
    let deadline = Instant::now() + within;
    let path = json!({"path": format!("/machine/peripheral/{device}/virtio-backend")});
    loop {
        match qmp.execute("x-query-virtio-status", Some(path.clone()), QUICK) {
            Err(qmp::Error::Refused { class, .. }) if class == "CommandNotFound" => return Ok(()),
            Ok(status) if is_ok(&status) => {
                settle();
                return Ok(());
            }
            Ok(_) if Instant::now() >= deadline || !there() => return Ok(()),
            Ok(_) => {
                let _ = after(RETRY).recv();
            }
            Err(e) => return Err(e),
        }
    }
}

/// Waits as long as [`SETTLE`].
pub fn settle() {
    let _ = after(SETTLE).recv();
}

fn is_ok(status: &Value) -> bool {
    if status["vhost-started"] != true {
        return false;
    }
    let said = status["status"]["statuses"].as_array().into_iter().flatten();
    said.filter_map(Value::as_str).any(|s| s.starts_with(DRIVER_OK))
}
