//! `vmcache template`.

use std::fs::{self, File};
use std::io;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sched::{setns, unshare, CloneFlags};
use serde_json::json;

use super::args::{Common, Template as Command};
use super::output::{age, Failure, FAILED};
use super::progress::Progress;
use super::session::Session;
use super::{print, Outcome};
use crate::config::options::FACTORY;
use crate::config::Config;
use crate::factory::template::{Status, Template};

/// Makes, shows or removes the template of the configuration.
pub fn template(common: &Common, command: &Command) -> Outcome {
    let config = Arc::new(Config::load(common.config.as_deref())?);
    let template = Template::new(&config);
    match command {
        Command::Create(j) => {
            config.check_files()?;
            config.check_template()?;
            let session = Session::start()?;
            let progress = Progress::start("making the template");
            let made = template.create(&mut |birth| session.hold(birth))?;
            session.release();
            drop(progress);
            let status = look(&template)?;
            show(&status, j.json, Some(made))?;
            Ok(0)
        }
        Command::Place => {
            if config.pool > 0 && config.flag(FACTORY, "enable_template") {
                join_hosts_mounts().map_err(|e| {
                    Failure::new(FAILED, format!("join the mount namespace of pid 1: {e}"))
                })?;
                template.place().map_err(|e| Failure::of(FAILED, &e))?;
            }
            Ok(0)
        }
        Command::Status(j) => {
            let status = look(&template)?;
            show(&status, j.json, None)?;
            Ok(u8::from(!status.fits))
        }
        Command::Destroy(j) => {
            let there = template.destroy().map_err(|e| Failure::of(FAILED, &e))?;
            match j.json {
                true => print::json(&json!({"destroyed": there}))?,
                false if there => print::line("the template is gone")?,
                false => print::line("there was no template")?,
            }
            Ok(0)
        }
    }
}

/// What is mounted from here on is mounted for the host: a unit's commands have a mount
/// namespace of their own, even those with full privileges.
fn join_hosts_mounts() -> io::Result<()> {
    let same = |a: &str, b: &str| Ok::<_, io::Error>(fs::read_link(a)? == fs::read_link(b)?);
    if same("/proc/self/ns/mnt", "/proc/1/ns/mnt")? {
        return Ok(());
    }
    let hosts = File::open("/proc/1/ns/mnt")?;
    unshare(CloneFlags::CLONE_FS)?;
    Ok(setns(hosts, CloneFlags::CLONE_NEWNS)?)
}

fn look(template: &Template) -> Result<Status, Failure> {
    template.status().map_err(|e| Failure::new(FAILED, format!("look at the template: {e}")))
}

fn show(s: &Status, json: bool, made: Option<bool>) -> print::Printed {
    if json {
        let mut out = json!({"path": s.path, "exists": s.manifest.is_some(), "fits": s.fits});
        if let Some(m) = &s.manifest {
            out["memory_mib"] = m.memory_mib.into();
            out["state_bytes"] = m.state_bytes.into();
            out["qemu_version"] = m.qemu_version.clone().into();
            out["created"] = m.created.into();
        }
        if let Some(made) = made {
            out["made"] = made.into();
        }
        return print::json(&out);
    }
    let Some(m) = &s.manifest else {
        return print::line(format!("no template in {}", s.path.display()));
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    print::line(format!(
        "{}: {} MiB of memory, {} KiB of device state, QEMU {}, made {} ago{}",
        s.path.display(),
        m.memory_mib,
        m.state_bytes / 1024,
        m.qemu_version,
        age(now.saturating_sub(m.created)),
        if s.fits { "" } else { "; it does not fit the configuration and will be made anew" }
    ))
}
