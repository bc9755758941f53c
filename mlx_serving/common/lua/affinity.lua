-- Which workers likely have the beginning of a job's prompt computed: those that took a job of one of its marks lately.
-- Follows the prelude, before claim.lua. A job's marks are its control hash's 'af', "<conversation>,<beginning>", either may be
-- empty. Nothing here decides more than who goes first: whatever is lost or odd under these keys delays a job by the bound.

local HOLDERS, MARK_MS = 8, 600000  -- names kept of a mark, the last one first; how long
local SPREAD = 4  -- a beginning is computed anew where those that have it hold this part of their rows more than others
local NAME = '[^\n]+'

local holders, noted, peers = {}, {}, {}  -- what this claim has read: by mark, by mark, by worker

local function marks_of(c)
  if not c.af or #c.af > 64 then return '', '' end
  local conversation, beginning = string.match(c.af, '^(%x*),(%x*)$')
  return conversation or '', beginning or ''
end

-- A line each, with one before the first and one after the last.
local function holders_of(mark)
  if not holders[mark] then
    local names = redis.pcall('GET', k_warm(mark))
    holders[mark] = type(names) == 'string' and names or ''
  end
  return holders[mark]
end

local function holds(mark, worker) return string.find(holders_of(mark), '\n' .. worker .. '\n', 1, true) ~= nil end

local function note_holder(mark, worker)
  if mark == '' or noted[mark] then return end
  local names, count = {'', worker}, 1
  for name in string.gmatch(holders_of(mark), NAME) do
    if name ~= worker and count < HOLDERS then
      names[#names + 1], count = name, count + 1
    end
  end
  names[#names + 1] = ''
  noted[mark], holders[mark] = true, table.concat(names, '\n')
  redis.pcall('SET', k_warm(mark), holders[mark], 'PX', MARK_MS)
end

-- What another worker says of itself, and how many jobs it holds; false where it takes none.
local function peer(name)
  if peers[name] == nil then
    local said = redis.pcall('HMGET', k_worker(name), 'state', 'resident', 'batch_rows')
    local held = redis.pcall('SCARD', k_rq_worker_executions(name))
    local serves = not said.err and said[1] == 'serving' and type(held) == 'number'
    peers[name] = serves and {models = ',' .. (said[2] or '') .. ',', rows = tonumber(said[3] or '') or 0, held = held}
  end
  return peers[name]
end

-- One of the mark's workers that serves the model and holds fewer jobs than it has rows and than `most`; nil where none does.
local function roomy_holder(mark, model, most)
  for name in string.gmatch(holders_of(mark), NAME) do
    local p = peer(name)
    if p and p.held < p.rows and p.held <= most(p) and string.find(p.models, ',' .. model .. ',', 1, true) then return p end
  end
end

local function any(p) return p.rows end

-- The worker that should have the job rather than this one, which holds `rows`; nil where this one should.
-- A conversation goes where it is while there is room. A beginning is soon everywhere: it spreads as the load does.
local function better_place(c, queue, worker, rows)
  local model = string.match(queue, '^(.*):') or ''
  local conversation, beginning = marks_of(c)
  if conversation ~= '' then
    if holds(conversation, worker) then return nil end
    local p = roomy_holder(conversation, model, any)
    if p then return p end
  end
  if beginning == '' or holds(beginning, worker) then return nil end
  return roomy_holder(beginning, model, function(p) return rows + p.rows / SPREAD end)
end
