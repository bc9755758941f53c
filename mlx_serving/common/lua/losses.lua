-- Losses: attempts whose worker let its lease run out and has not shown itself since. Follows the prelude.
-- A job's losses are entries "<nonce>,<ms>,<alone>,<machine>,<owner>", a space between two. `alone`: since when (ms) the job ran
-- alone; 0: it did not, or another worker was lost on its machine meanwhile.
-- A worker that comes back (a Mac that slept) sends its attempt's nonce with its next call, and that takes the loss back. From
-- SUSPECT losses on the job runs in small company, from one more on alone, to its end. Lost alone twice, it is isolated: on no
-- list, so that it takes no other machine with it. It is dead once two machines on which it was alone are known to be awake.
-- A nonce ends in "-<life>-<machine>": its worker's process, and the machine of that. Of a machine, Redis holds "<since>,<seen>",
-- the time (ms) in which it was seen awake, and then " <owner>,<ms>" for each worker that was lost there last.
local LOSSES = {}

do
local SUSPECT, COMPANY = 2, 4
local MOST = 16  -- losses kept; with so many a job is isolated, alone or not
local PROGRESS = 16  -- events of an attempt that show that it did not die of how it began
local KEPT, KEPT_MS = 16, 172800000
local AWAKE, TOGETHER, OTHERS_FIRST = 6, 3, 6  -- leases
local LOSS = '([^, ]+),(%d+),(%d+),([^, ]+),([^, ]+)'

local BACK_MS = 30000  -- how long a worker's record is kept (`fleet.EXPIRY_SECONDS`): a later one was written after the loss

local function plain(name) return (string.gsub(name, '[,%s]', '_')) end

local function machine_of(nonce, owner) return string.match(nonce, '%-(%x+)$') or plain(owner) end

local function life_of(nonce) return string.match(nonce, '%-(%x+)%-%x+$') end

local function read(losses)
  local entries = {}
  for nonce, ms, alone, machine, owner in string.gmatch(losses or '', LOSS) do
    entries[#entries + 1] = {nonce = nonce, ms = tonumber(ms), alone = tonumber(alone), machine = machine, owner = owner}
  end
  return entries
end

local function text_of(entries)
  local texts = {}
  for i, e in ipairs(entries) do
    texts[i] = table.concat({e.nonce, int(e.ms), int(e.alone), e.machine, e.owner}, ',')
  end
  return table.concat(texts, ' ')
end

local function read_machine(machine)
  local text = redis.pcall('GET', k_machine(machine))
  if type(text) ~= 'string' then text = '' end
  local since, seen = string.match(text, '^(%d+),(%d+)')
  local found = {since = tonumber(since or 0), seen = tonumber(seen or 0), lost = {}}
  for owner, ms in string.gmatch(text, ' ([^, ]+),(%d+)') do
    found.lost[#found.lost + 1] = {owner = owner, ms = tonumber(ms)}
  end
  return found
end

local function write_machine(machine, found)
  local texts = {int(found.since) .. ',' .. int(found.seen)}
  for i = math.max(1, #found.lost - KEPT + 1), #found.lost do
    texts[#texts + 1] = found.lost[i].owner .. ',' .. int(found.lost[i].ms)
  end
  redis.pcall('SET', k_machine(machine), table.concat(texts, ' '), 'PX', KEPT_MS)
end

-- Whether another worker was lost on the machine with it: who of them took it down is not known.
local function is_accompanied(loss, lease)
  for _, other in ipairs(read_machine(loss.machine).lost) do
    local together = other.ms >= loss.alone and other.ms - loss.ms <= TOGETHER * lease
    if other.owner ~= loss.owner and together then return true end
  end
  return false
end

-- Whether the worker had time to come back: its machine was awake since. One that nobody saw may sleep, however long.
local function is_gone(loss, now, lease)
  local machine = read_machine(loss.machine)
  return machine.seen - math.max(machine.since, loss.ms) >= AWAKE * lease
end

-- Takes losses back whose workers are there; returns those that stay.
local function take_back(id, entries, is_back)
  local kept = {}
  for _, loss in ipairs(entries) do
    if not is_back(loss) then kept[#kept + 1] = loss end
  end
  if #kept < #entries then
    redis.call('HDEL', k_job(id), '')  -- removes nothing, so that a full Redis lets the script go on (see renew.lua)
    set_fields(id, {losses = text_of(kept)})
  end
  return kept
end

-- Takes a loss back: its worker speaks of it.
function LOSSES.forgive(id, nonce)
  local losses = redis.pcall('HGET', k_job(id), F.losses)
  if type(losses) ~= 'string' or not string.find(losses, nonce, 1, true) then return end
  take_back(id, read(losses), function(loss) return loss.nonce == nonce end)
end

-- Takes back losses of workers that never heard of the attempt, or forgot it, if their records say that they live.
local function forgive_living(id, entries, now, lease)
  return take_back(id, entries, function(loss)
    local life = life_of(loss.nonce)
    if not life or now - loss.ms < math.max(AWAKE * lease, BACK_MS) then return false end
    return redis.pcall('HGET', k_worker(loss.owner), WORKER.life) == life
  end)
end

-- Bounds the company of a job that a claim looks at, by its losses. Those of the claiming process itself are taken back first.
function LOSSES.weigh(id, job, nonce, worker)
  if (job.losses or '') == '' then return end
  local entries, life, owner = read(job.losses), life_of(nonce), plain(worker)
  if life then
    entries = take_back(id, entries, function(loss) return loss.owner == owner and life_of(loss.nonce) == life end)
    job.losses = text_of(entries)
  end
  local count = #entries
  if count < SUSPECT then return end
  local bound, own = count == SUSPECT and COMPANY or 1, tonumber(job.max_unproven or 0)
  job.max_unproven = int((own == 0 or bound < own) and bound or own)
  job.runs_alone = bound == 1
end

-- Whether a job that must run alone is not for this worker: it was lost alone on its machine. Others go first for a while.
-- The second is whether it is for no worker: it is to be isolated, or is.
function LOSSES.is_barred(id, job, nonce, worker, now, lease)
  if not job.runs_alone then return false, false end
  local here, machines, count, last, entries = machine_of(nonce, worker), {}, 0, 0, read(job.losses)
  for _, loss in ipairs(entries) do
    if loss.alone > 0 then
      machines[loss.machine] = (machines[loss.machine] or 0) + 1
      if loss.machine == here then last = loss.ms end
    end
  end
  for _ in pairs(machines) do count = count + 1 end
  local is_final = count >= 2 or #entries >= MOST or type(redis.pcall('ZSCORE', k_isolated(job.queue), id)) == 'string'
  return is_final or (machines[here] or 0) >= 2 or (last > 0 and now - last < OTHERS_FIRST * lease), is_final
end

-- Notes that a running attempt was lost; returns whether the job is to be isolated. `job`: LOSSES.READ.
LOSSES.READ = {'losses', 'alone', 'nonce', 'seq', 'owner', 'queue', 'tenant'}
function LOSSES.note(id, job, now, lease)
  local nonce, owner = job.nonce or 'none', plain(job.owner)
  local machine, entries = machine_of(nonce, job.owner), forgive_living(id, read(job.losses), now, lease)
  local named, seq, since = string.match(job.alone or '', '^(%S+) (%d+) (%d+)$')
  local was_alone = named == nonce and tonumber(job.seq) - tonumber(seq) < PROGRESS
  entries[#entries + 1] = {nonce = nonce, ms = now, alone = was_alone and tonumber(since) or 0, machine = machine, owner = owner}
  if #entries > MOST then table.remove(entries, 1) end
  set_fields(id, {losses = text_of(entries), suspect_since_ms = #entries >= SUSPECT and int(now) or nil})
  local found = read_machine(machine)
  local last = found.lost[#found.lost]
  if not last or last.owner ~= owner or last.ms ~= now then
    found.lost[#found.lost + 1] = {owner = owner, ms = now}
    write_machine(machine, found)
  end
  local ends = 0
  for _, loss in ipairs(entries) do ends = ends + (loss.alone > 0 and 1 or 0) end
  return ends >= 2 or #entries >= MOST
end

-- Takes a queued job off its list, out of every claim's sight.
function LOSSES.isolate(id, job, now)
  redis.call('LREM', k_rq_queue(job.queue), 1, id)
  if job.tenant then tolerantly(leave_line, id, job.queue, job.tenant) end
  redis.call('ZADD', k_isolated(job.queue), int(now), id)
end

-- What becomes of an isolated job: 'dead' and why, 'requeued', or nil: it stays. `here`: machine of the caller, or ''.
function LOSSES.judge(id, job, here, now, lease)
  local entries = forgive_living(id, read(job.losses), now, lease)
  local machines, owners, count, ends, gone = {}, {}, 0, 0, 0
  for _, loss in ipairs(entries) do
    if loss.alone > 0 and is_accompanied(loss, lease) then
      loss.alone = 0
      set_fields(id, {losses = text_of(entries)})
    end
    if loss.alone > 0 then
      ends = ends + 1
      owners[ends] = loss.owner
      if not machines[loss.machine] then
        machines[loss.machine], count = true, count + 1
        if is_gone(loss, now, lease) then gone = gone + 1 end
      end
    end
  end
  if count >= 2 then
    if gone < 2 then return nil end
    return 'dead', 'workers on ' .. count .. ' machines were lost while the job ran alone (' .. table.concat(owners, ', ') ..
      '), ' .. #entries .. ' workers in all'
  end
  if #entries >= MOST then return nil end
  if ends < 2 or (here ~= '' and not machines[here]) then return 'requeued' end
  return nil
end

-- Notes that a machine is awake. Nobody asks before a job is isolated.
function LOSSES.see(machine, now, lease)
  if machine == '' then return end
  local found = read_machine(machine)
  if now - found.seen < lease and found.seen <= now then return end
  if now - found.seen > 3 * lease or found.seen > now then found.since = now end
  found.seen = now
  write_machine(machine, found)
end
end
