//! What makes a guest its own: random numbers and the clock.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::fd::AsFd;

use nix::sys::time::TimeSpec;
use nix::time::{clock_settime, ClockId};

use super::failure::{Attempt, Failure, Outcome};
use crate::proto::agent::GuestDetailsResponse;
use crate::sys::guest::{add_entropy, reseed_crng, MAX_SEED};

/// Mixes `seed` into the kernel's generator so that the next byte read by
/// anyone depends on it: written, credited, and a new key taken at once.
pub fn reseed(seed: &[u8]) -> Outcome<()> {
    if seed.is_empty() || seed.len() > MAX_SEED {
        return Err(Failure::invalid(format!(
            "a seed has 1 to {MAX_SEED} bytes, not {}",
            seed.len()
        )));
    }
    let mut random = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/urandom")
        .during(|| "open /dev/urandom")?;
    random.write_all(seed).during(|| "write the seed")?;
    add_entropy(random.as_fd(), seed).during(|| "credit the seed")?;
    reseed_crng(random.as_fd()).during(|| "make the generator take a new key")
}

/// Sets the wall clock.
pub fn set_clock(seconds: i64, microseconds: i64) -> Outcome<()> {
    if !(0..1_000_000).contains(&microseconds) || seconds < 0 {
        return Err(Failure::invalid(format!("time {seconds} s {microseconds} us")));
    }
    clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::new(seconds, microseconds * 1000))
        .during(|| format!("set the clock to {seconds}.{microseconds:06}"))
}

/// Brings hot-added CPUs and memory online.
///
/// With `wait`, the CPUs must be there: all `cpus` of them, or an error.
pub fn online(cpus: u32, cpu_only: bool, wait: bool) -> Outcome<()> {
    let mut brought = 0;
    let devices = fs::read_dir("/sys/devices/system/cpu").during(|| "list the CPUs")?;
    for entry in devices.flatten() {
        if brought == cpus && cpus > 0 {
            break;
        }
        let file = entry.path().join("online");
        if fs::read_to_string(&file).is_ok_and(|s| s.trim() == "0") {
            fs::write(&file, "1").during(|| format!("bring {} online", entry.path().display()))?;
            brought += 1;
        }
    }
    if wait && brought < cpus {
        return Err(Failure::internal(format!(
            "{cpus} CPUs to bring online, {brought} offline ones found"
        )));
    }
    if cpu_only {
        return Ok(());
    }
    for entry in fs::read_dir("/sys/devices/system/memory").into_iter().flatten().flatten() {
        let file = entry.path().join("state");
        if fs::read_to_string(&file).is_ok_and(|s| s.trim() == "offline") {
            fs::write(&file, "online")
                .during(|| format!("bring {} online", entry.path().display()))?;
        }
    }
    Ok(())
}

/// Tells the kernel of memory that was added, where it does not hear of it itself.
pub fn probe(addresses: &[u64]) -> Outcome<()> {
    let file = "/sys/devices/system/memory/probe";
    for address in addresses {
        fs::write(file, format!("{address:#x}"))
            .during(|| format!("write the address {address:#x} to {file}"))?;
    }
    Ok(())
}

/// What GetGuestDetails tells of memory hotplug.
pub fn details(block_size: bool, probe: bool) -> GuestDetailsResponse {
    let mut out = GuestDetailsResponse::default();
    let dir = "/sys/devices/system/memory";
    if block_size {
        let text = fs::read_to_string(format!("{dir}/block_size_bytes")).unwrap_or_default();
        out.mem_block_size_bytes = u64::from_str_radix(text.trim(), 16).unwrap_or(0);
    }
    if probe {
        out.support_mem_hotplug_probe = fs::metadata(format!("{dir}/probe")).is_ok();
    }
    out
}
