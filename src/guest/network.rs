//! Network interfaces and routes of the guest, over rtnetlink.
//!
//! As Kata's agents do: an interface is found by its hardware address and gets
//! name, MTU and exactly the addresses given; UpdateRoutes replaces all routes
//! but those that the kernel made itself.

use std::net::IpAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use netlink_packet_core::{
    NetlinkHeader, NetlinkMessage, NetlinkPayload, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP,
    NLM_F_REPLACE, NLM_F_REQUEST,
};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{protocols::NETLINK_ROUTE, Socket, SocketAddr};
use ttrpc::Code;

use super::failure::{Attempt, Failure, Outcome};
use super::storage::{COMING, LOOK};
use crate::proto::types::{IPAddress, IPFamily, Interface, Route};

/// Most messages read of one dump.
const MAX_DUMP: usize = 65_536;

struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    fn open() -> Outcome<Netlink> {
        let attempt = || "open rtnetlink";
        let mut socket = Socket::new(NETLINK_ROUTE).during(attempt)?;
        socket.bind_auto().during(attempt)?;
        socket.connect(&SocketAddr::new(0, 0)).during(attempt)?;
        Ok(Netlink { socket, sequence: 0 })
    }

    /// Sends a request and collects what is answered, up to the acknowledgement
    /// or the end of the dump.
    fn call(
        &mut self,
        message: RouteNetlinkMessage,
        flags: u16,
        what: &str,
    ) -> Outcome<Vec<RouteNetlinkMessage>> {
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        self.sequence += 1;
        header.sequence_number = self.sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let mut buffer = vec![0; packet.buffer_len()];
        packet.serialize(&mut buffer);
        self.socket.send(&buffer, 0).during(|| what.to_string())?;
        let mut out = Vec::new();
        loop {
            let (bytes, _) = self.socket.recv_from_full().during(|| what.to_string())?;
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let reply = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|e| Failure::internal(format!("{what}: the kernel's answer: {e}")))?;
                let length = (reply.header.length as usize).next_multiple_of(4).max(16);
                rest = rest.get(length..).unwrap_or_default();
                match reply.payload {
                    NetlinkPayload::Done(_) => return Ok(out),
                    NetlinkPayload::Error(e) if e.raw_code() == 0 => return Ok(out),
                    NetlinkPayload::Error(e) => return Err(e.to_io()).during(|| what.to_string()),
                    NetlinkPayload::InnerMessage(m) if out.len() < MAX_DUMP => out.push(m),
                    _ => {}
                }
            }
        }
    }

    fn links(&mut self) -> Outcome<Vec<LinkMessage>> {
        let all = RouteNetlinkMessage::GetLink(LinkMessage::default());
        let answers = self.call(all, NLM_F_DUMP, "list interfaces")?;
        Ok(answers
            .into_iter()
            .filter_map(|m| if let RouteNetlinkMessage::NewLink(l) = m { Some(l) } else { None })
            .collect())
    }

    fn addresses(&mut self) -> Outcome<Vec<AddressMessage>> {
        let all = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let answers = self.call(all, NLM_F_DUMP, "list addresses")?;
        Ok(answers
            .into_iter()
            .filter_map(|m| if let RouteNetlinkMessage::NewAddress(a) = m { Some(a) } else { None })
            .collect())
    }

    fn routes(&mut self) -> Outcome<Vec<RouteMessage>> {
        let mut out = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut all = RouteMessage::default();
            all.header.address_family = family;
            let answers =
                self.call(RouteNetlinkMessage::GetRoute(all), NLM_F_DUMP, "list routes")?;
            out.extend(answers.into_iter().filter_map(|m| match m {
                RouteNetlinkMessage::NewRoute(r)
                    if r.header.table == RouteHeader::RT_TABLE_MAIN =>
                {
                    Some(r)
                }
                _ => None,
            }));
        }
        Ok(out)
    }

    fn set_link(
        &mut self,
        index: u32,
        up: bool,
        change: Vec<LinkAttribute>,
        what: &str,
    ) -> Outcome<()> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        link.header.change_mask = LinkFlags::Up;
        if up {
            link.header.flags = LinkFlags::Up;
        }
        link.attributes = change;
        self.call(RouteNetlinkMessage::SetLink(link), NLM_F_ACK, what).map(|_| ())
    }
}

fn name_of(link: &LinkMessage) -> &str {
    let name = link.attributes.iter().find_map(|a| match a {
        LinkAttribute::IfName(n) => Some(n.as_str()),
        _ => None,
    });
    name.unwrap_or_default()
}

fn hardware(link: &LinkMessage) -> String {
    let bytes = link.attributes.iter().find_map(|a| match a {
        LinkAttribute::Address(b) => Some(b.as_slice()),
        _ => None,
    });
    let parts: Vec<String> = bytes.unwrap_or_default().iter().map(|b| format!("{b:02x}")).collect();
    parts.join(":")
}

/// Brings `lo` up.
pub fn loopback_up() -> Outcome<()> {
    let mut netlink = Netlink::open()?;
    let links = netlink.links()?;
    let Some(lo) = links.iter().find(|l| name_of(l) == "lo") else { return Ok(()) };
    netlink.set_link(lo.header.index, true, Vec::new(), "bring lo up")
}

/// All interfaces with their addresses.
pub fn interfaces() -> Outcome<Vec<Interface>> {
    let mut netlink = Netlink::open()?;
    let links = netlink.links()?;
    let addresses = netlink.addresses()?;
    Ok(links.iter().map(|link| describe(link, &addresses)).collect())
}

fn describe(link: &LinkMessage, addresses: &[AddressMessage]) -> Interface {
    let mtu = link.attributes.iter().find_map(|a| match a {
        LinkAttribute::Mtu(n) => Some(u64::from(*n)),
        _ => None,
    });
    let own = addresses.iter().filter(|a| a.header.index == link.header.index);
    let list = own.filter_map(|a| {
        let address = address_of(a)?;
        Some(IPAddress {
            family: if address.is_ipv4() { IPFamily::v4 } else { IPFamily::v6 }.into(),
            address: address.to_string(),
            mask: a.header.prefix_len.to_string(),
            ..IPAddress::default()
        })
    });
    Interface {
        name: name_of(link).to_string(),
        IPAddresses: list.collect(),
        mtu: mtu.unwrap_or(0),
        hwAddr: hardware(link),
        ..Interface::default()
    }
}

fn address_of(a: &AddressMessage) -> Option<IpAddr> {
    let local = a.attributes.iter().find_map(|x| match x {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    local.or_else(|| {
        a.attributes.iter().find_map(|x| match x {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })
    })
}

/// The interface that is meant; one that is named by a PCI path was just plugged
/// in, and may be yet to come.
fn find(netlink: &mut Netlink, wanted: &Interface) -> Outcome<LinkMessage> {
    let hw = wanted.hwAddr.to_lowercase();
    let within = if wanted.devicePath.is_empty() { Duration::ZERO } else { COMING };
    let deadline = Instant::now() + within;
    loop {
        let found = netlink.links()?.into_iter().find(|l| match hw.is_empty() {
            false => hardware(l) == hw,
            true => name_of(l) == wanted.name || name_of(l) == wanted.device,
        });
        if let Some(link) = found {
            return Ok(link);
        }
        if Instant::now() >= deadline {
            let name = &wanted.name;
            return Err(Failure::not_found(format!(
                "no interface with hardware address {hw:?} or name {name:?}"
            )));
        }
        sleep(LOOK);
    }
}

/// Gives an interface its name, MTU and addresses, and brings it up.
pub fn update_interface(wanted: &Interface) -> Outcome<()> {
    let mut netlink = Netlink::open()?;
    let link = &find(&mut netlink, wanted)?;
    let index = link.header.index;
    let was = name_of(link).to_string();
    for old in netlink.addresses()? {
        if old.header.index == index {
            let what = format!("remove an address of {was}");
            netlink.call(RouteNetlinkMessage::DelAddress(old), NLM_F_ACK, &what)?;
        }
    }
    let mut change = Vec::new();
    if !wanted.name.is_empty() && wanted.name != was {
        change.push(LinkAttribute::IfName(wanted.name.clone()));
        // A name changes only while the interface is down.
        netlink.set_link(index, false, Vec::new(), &format!("take {was} down"))?;
    }
    if wanted.mtu > 0 {
        let mtu = u32::try_from(wanted.mtu).ok();
        let mtu = mtu.ok_or_else(|| Failure::invalid(format!("mtu {}", wanted.mtu)))?;
        change.push(LinkAttribute::Mtu(mtu));
    }
    if !change.is_empty() {
        netlink.set_link(index, false, change, &format!("name {was} {}", wanted.name))?;
    }
    for a in &wanted.IPAddresses {
        let what = format!("give {was} the address {}/{}", a.address, a.mask);
        let (ip, prefix) = (a.address.parse::<IpAddr>().ok(), prefix(&a.mask));
        let Some((ip, prefix)) = ip.zip(prefix) else {
            return Err(Failure::invalid(what));
        };
        let mut message = AddressMessage::default();
        message.header.family =
            if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        message.header.prefix_len = prefix;
        message.header.index = index;
        message.attributes = vec![AddressAttribute::Local(ip), AddressAttribute::Address(ip)];
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        netlink.call(RouteNetlinkMessage::NewAddress(message), flags, &what)?;
    }
    netlink.set_link(index, true, Vec::new(), &format!("bring {was} up"))
}

/// A prefix length, given as such or as a dotted mask.
fn prefix(mask: &str) -> Option<u8> {
    if let Ok(n) = mask.parse::<u8>() {
        return (n <= 128).then_some(n);
    }
    let bits = u32::from(mask.parse::<std::net::Ipv4Addr>().ok()?);
    (bits.leading_ones() + bits.trailing_zeros() >= 32).then(|| bits.leading_ones() as u8)
}

/// Routes of the main table.
pub fn routes() -> Outcome<Vec<Route>> {
    let mut netlink = Netlink::open()?;
    let links = netlink.links()?;
    let mut out = Vec::new();
    for message in netlink.routes()? {
        let v4 = message.header.address_family == AddressFamily::Inet;
        let mut route = Route {
            family: if v4 { IPFamily::v4 } else { IPFamily::v6 }.into(),
            scope: u8::from(message.header.scope).into(),
            ..Route::default()
        };
        let text = |a: &RouteAddress| match a {
            RouteAddress::Inet(ip) => ip.to_string(),
            RouteAddress::Inet6(ip) => ip.to_string(),
            _ => String::new(),
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Destination(a) => {
                    route.dest = format!("{}/{}", text(a), message.header.destination_prefix_length)
                }
                RouteAttribute::Gateway(a) => route.gateway = text(a),
                RouteAttribute::PrefSource(a) => route.source = text(a),
                RouteAttribute::Oif(index) => {
                    let link = links.iter().find(|l| l.header.index == *index);
                    route.device = link.map(name_of).unwrap_or_default().to_string();
                }
                _ => {}
            }
        }
        out.push(route);
    }
    Ok(out)
}

/// Replaces all routes but the kernel's own.
pub fn update_routes(wanted: &[Route]) -> Outcome<()> {
    let mut netlink = Netlink::open()?;
    let links = netlink.links()?;
    for old in netlink.routes()? {
        if old.header.protocol != RouteProtocol::Kernel {
            netlink.call(RouteNetlinkMessage::DelRoute(old), NLM_F_ACK, "remove a route")?;
        }
    }
    // Those without a gateway first: the others need them to reach theirs.
    let (direct, via): (Vec<_>, Vec<_>) = wanted.iter().partition(|r| r.gateway.is_empty());
    for route in direct.into_iter().chain(via) {
        let message = to_message(route, &links)?;
        let what = format!("add route to {:?} via {:?}", route.dest, route.gateway);
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        netlink.call(RouteNetlinkMessage::NewRoute(message), flags, &what)?;
    }
    Ok(())
}

fn to_message(route: &Route, links: &[LinkMessage]) -> Outcome<RouteMessage> {
    let bad = |what: &str| {
        Failure::new(Code::INVALID_ARGUMENT, format!("route to {:?}: {what}", route.dest))
    };
    let address = |text: &str, what: &str| {
        text.parse::<IpAddr>().map(RouteAddress::from).map_err(|_| bad(what))
    };
    let v4 = route.family.enum_value_or_default() == IPFamily::v4;
    let mut m = RouteMessage::default();
    m.header.address_family = if v4 { AddressFamily::Inet } else { AddressFamily::Inet6 };
    m.header.table = RouteHeader::RT_TABLE_MAIN;
    m.header.protocol = RouteProtocol::Boot;
    m.header.scope = RouteScope::from(route.scope.min(255) as u8);
    m.header.kind = RouteType::Unicast;
    if !route.dest.is_empty() && route.dest != "default" {
        let (ip, length) = route.dest.split_once('/').unwrap_or((&route.dest, ""));
        let whole = if v4 { 32 } else { 128 };
        let length =
            if length.is_empty() { whole } else { length.parse().map_err(|_| bad("prefix"))? };
        if length > whole {
            return Err(bad("prefix"));
        }
        m.header.destination_prefix_length = length;
        if length > 0 {
            m.attributes.push(RouteAttribute::Destination(address(ip, "destination")?));
        }
    }
    if !route.gateway.is_empty() {
        m.attributes.push(RouteAttribute::Gateway(address(&route.gateway, "gateway")?));
    }
    if !route.source.is_empty() {
        m.attributes.push(RouteAttribute::PrefSource(address(&route.source, "source")?));
    }
    if !route.device.is_empty() {
        let link = links.iter().find(|l| name_of(l) == route.device);
        let link = link.ok_or_else(|| bad(&format!("no interface {:?}", route.device)))?;
        m.attributes.push(RouteAttribute::Oif(link.header.index));
    }
    Ok(m)
}

#[cfg(test)]
mod tests {
    use super::prefix;

    #[test]
    fn masks_are_lengths_or_dotted() {
        assert_eq!(prefix("24"), Some(24));
        assert_eq!(prefix("255.255.255.0"), Some(24));
        assert_eq!(prefix("0.0.0.0"), Some(0));
        assert_eq!(prefix("255.0.255.0"), None);
        assert_eq!(prefix("129"), None);
    }
}
