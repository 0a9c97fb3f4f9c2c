//! From QEMU's monitor to the guest's agent: what carries connections to it is
//! started, and it is waited for.

use std::time::Duration;

use super::attend;
use super::{Booted, Connected, Source};
use crate::agent;
use crate::agent::address::Address;
use crate::config::Config;
use crate::hypervisor::qemu::argv::VSOCK;
use crate::hypervisor::qemu::virtio;
use crate::process::attendant::Attendant;
use crate::vm::boot::{BootError, Phase};
use crate::vm::console::Console;
use crate::vm::identity;

/// How long a guest that ended a connection may take to answer on the next one, before it is
/// looked whether there is still one.
const AGAIN: Duration = Duration::from_secs(2);

impl Connected {
    pub(super) fn await_guest(mut self, config: &Config) -> Result<Booted, BootError> {
        if let Err(e) = self.attend(config) {
            return Err(self.spawned.failed(Phase::Attendant, e, ""));
        }
        let console = Console::open(&self.spawned.dir);
        let answered = self.answer();
        let console = console.map(Console::close).unwrap_or_default();
        match answered {
            Ok(()) => Ok(Booted { connected: self }),
            Err(e) => Err(self.spawned.failed(Phase::Guest, e, &console)),
        }
    }

    /// Starts what needs QEMU to run, and writes it down.
    fn attend(&mut self, config: &Config) -> Result<(), Source> {
        let spawned = &mut self.spawned;
        if !matches!(spawned.agent.address(), Address::Proxy(_)) {
            return Ok(());
        }
        let leased = spawned.ledger.owner.is_some_and(|o| o.lease);
        let command = attend::proxy(config, &spawned.ledger.id, leased)?;
        if let Some(mut proxy) = spawned.agent.start_proxy(&command)? {
            let within = spawned.clock.left();
            attend::await_proxy(&mut proxy, spawned.agent.address(), within)?;
            spawned.attendants.push(proxy);
            spawned.ledger.attendants = spawned.attendants.iter().map(Attendant::record).collect();
            spawned.ledger.write(spawned.dir.path())?;
        }
        Ok(())
    }

    fn answer(&mut self) -> Result<(), Source> {
        let Connected { spawned, monitor } = self;
        let (agent, clock) = (&spawned.agent, spawned.clock);
        if matches!(agent.address(), Address::Hybrid { .. }) {
            let there = || spawned.attendants.iter().all(Attendant::alive);
            virtio::await_driver(monitor, VSOCK, there, clock.left())?;
        }
        let ask = |within: Duration| {
            agent.connect(within, true)?;
            agent.check(within)
        };
        let lives = || spawned.process.alive() && spawned.attendants.iter().all(Attendant::alive);
        let mut answered = ask(clock.left());
        if matches!(answered, Err(agent::Error::Call { .. })) {
            // A clone's guest may hear only now that its connections are another's, and end
            // this one with them. Or QEMU was killed, and is about to be seen dead: what it
            // was reached through may have left a socket at which nobody will ever listen.
            while lives() && answered.is_err() && !clock.left().is_zero() {
                agent.disconnect();
                answered = ask(clock.left().min(AGAIN));
            }
        }
        answered?;
        spawned.ledger.own_agent = identity::is_own(&**agent)?;
        Ok(())
    }
}
